"""What a GPU alone can show of the op: no hidden waits, streams, graphs, memory, compilation. All of it needs one."""

import threading

import pytest
import torch
import torch.nn.functional as F

from sn_openmmlab.ops import switch_norm
from sn_openmmlab.ops.torch_versions import VERSION

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
SHAPE = 4, 64, 56, 56


def arguments(channels=64):
    """Logits, weight, bias and running statistics."""
    learned = [torch.randn(size, device='cuda', requires_grad=True) for size in (3, 3, channels, channels)]
    statistics = [torch.zeros(channels, device='cuda'), torch.ones(channels, device='cuda')]
    return [*learned, *statistics]


def copies(args, dtype=torch.float32):
    """Others with the same numbers."""
    return [a.detach().to(dtype, copy=True).requires_grad_(a.requires_grad) for a in args]


def inputs(shape=SHAPE, dtype=torch.float32):
    x, dy = (torch.randn(shape, device='cuda').to(dtype) for _ in range(2))
    return x.requires_grad_(), dy


def step(x, dy, args, function=switch_norm, training=True):
    """Output and gradients."""
    y = function(x, *args, training=training)
    return [y.detach(), *torch.autograd.grad(y, [x, *args[:4]], dy)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.float64], ids=str)
def test_the_host_never_waits_for_the_gpu(dtype, training):
    x, dy = inputs(dtype=dtype)
    args = copies(arguments(), torch.float64 if dtype == torch.float64 else torch.float32)
    step(x, dy, args, training=training)  # compiles
    torch.cuda.set_sync_debug_mode('error')
    try:
        step(x, dy, args, training=training)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_the_same_bits_again():
    x, dy = inputs((2, 64, 200, 336))
    args = arguments()
    first, again = (step(x, dy, args) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_on_the_current_stream():
    """What another stream computes first is waited for, and the memory between the kernels is not reused too early."""
    x, dy = inputs()
    args = arguments()
    expected = step(x, dy, args)
    source, late = x.detach().clone(), torch.zeros_like(x, requires_grad=True)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        with torch.no_grad():
            late.copy_(source)
        found = step(late, dy, args)
    other = [torch.full_like(x, float('nan')) for _ in range(8)]  # on the stream that does not wait
    stream.synchronize()
    assert all(map(torch.equal, found, expected)) and len(other) == 8


def test_from_two_threads():
    results = {}

    def work(name):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            results[name] = [step(*case) for case in cases * 20][-len(cases) :]
            stream.synchronize()

    cases = [(*inputs(shape), arguments(shape[1])) for shape in (SHAPE, (2, 16, 9, 7), (2, 512, 50, 84))]
    expected = [step(*case) for case in cases]
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(name,)) for name in 'ab']
    [t.start() for t in threads]
    [t.join() for t in threads]
    for name in 'ab':
        assert all(torch.equal(*pair) for got, exact in zip(results[name], expected) for pair in zip(got, exact))


@pytest.mark.parametrize('shape', [SHAPE, (2, 64, 200, 336), (256, 64, 7, 7)], ids=str)
def test_a_cuda_graph_replays_a_training_step(shape):
    x, dy = inputs(shape)
    eager = arguments()
    args = copies(eager)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, dy, args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, dy, args)
    with torch.no_grad():
        [a.copy_(b) for a, b in zip(args[4:], eager[4:])]
        x.normal_()
    for _ in range(2):
        graph.replay()
        expected = step(x, dy, eager)
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
    assert all(map(torch.equal, args[4:], eager[4:])) and not torch.equal(eager[4], torch.zeros_like(eager[4]))


def peak(function):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('shape', [(2, 256, 100, 168), (256, 256, 7, 7)], ids=str)
def test_memory_is_that_of_batch_norm(shape, dtype):
    """A step takes what BatchNorm takes, and room for few numbers of each map."""
    x, dy = inputs(shape, dtype)
    args = arguments(256)

    def ours():
        return step(x, dy, args)

    def theirs():
        weight, bias, *statistics = args[2:]
        y = F.batch_norm(x, *statistics, weight, bias, training=True)
        return [y.detach(), *torch.autograd.grad(y, [x, weight, bias], dy)]

    ours(), theirs()
    maps = shape[0] * shape[1]
    assert peak(ours) <= peak(theirs) + maps * 8 * 32


@pytest.mark.skipif(VERSION < (2, 7), reason='before torch 2.7 compiled layers take the formula')
@pytest.mark.parametrize('mode', ['default', 'reduce-overhead'])
def test_compiled_it_keeps_the_kernels(mode):
    torch._dynamo.reset()
    compiled = torch.compile(switch_norm, fullgraph=True, mode=mode)
    eager = arguments()
    args = copies(eager)
    for _ in range(3):
        x, dy = inputs()
        torch.compiler.cudagraph_mark_step_begin()
        got = [t.clone() for t in step(x, dy, args, compiled)]
        torch.testing.assert_close(got, step(x, dy, eager), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(args[4:], eager[4:])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(x, dy, args, compiled)
        torch.cuda.synchronize()
    assert '_combine_kernel' in {event.key for event in profile.key_averages()}


def test_autocast_takes_half_input_and_float_parameters():
    x, dy = inputs()
    args = arguments()
    with torch.autocast('cuda', torch.float16):
        y = switch_norm(F.conv2d(x, torch.eye(64, device='cuda')[..., None, None]), *args, training=True)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), switch_norm(x.half().float(), *args, training=True), rtol=2e-3, atol=2e-3)
