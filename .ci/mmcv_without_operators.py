"""In the place of mmcv's compiled operators, which mmcv-lite lacks and mmdet imports: each says so when called."""


def __getattr__(name):
    def lacking(*args, **kwargs):
        raise NotImplementedError(f'{name} is one of the operators that mmcv-lite does not have')

    return lacking
