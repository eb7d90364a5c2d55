# The maintained distributions of OpenMMLab, on current torch and CUDA. From the repository's root:
#     docker build -f docker/onedl.Dockerfile -t sn_openmmlab:onedl .
FROM pytorch/pytorch:2.9.1-cuda12.8-cudnn9-devel
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
COPY requirements/build.txt requirements/onedl.txt /tmp/
# its operators compile, also those for CUDA, since no GPU can be seen while an image is built
RUN pip install --no-cache-dir --requirement /tmp/build.txt \
    && FORCE_CUDA=1 CFLAGS=-g0 pip install --no-cache-dir --no-build-isolation --requirement /tmp/onedl.txt
COPY . /workspace/sn_openmmlab
WORKDIR /workspace/sn_openmmlab
RUN pip install --no-cache-dir --no-build-isolation --no-deps . \
    && cd / && python -c "from sn_openmmlab.ops.backends.cpp.load import library; assert library() is not None"
