"""Processes of one gloo group that stay, and run one function of a test after the other."""

import contextlib
import datetime
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Processes:
    """``Processes(2)(function, *args)`` runs the function in both processes, and raises what any of them raised.

    A process that does not come back within ``timeout`` seconds, for instance since it waits for one that does not
    take part, fails the test. After a failure the next call starts new processes.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self.processes = []

    def __call__(self, function, *args, timeout: float = 120) -> list:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args))
        results = [pipe.recv() if pipe.poll(timeout) else (False, f'no answer in {timeout} s') for pipe in self.pipes]
        if not all(done for done, _ in results):
            self.stop()
            raise AssertionError('\n'.join(f'rank {i}: {r}' for i, (done, r) in enumerate(results) if not done))
        return [result for _, result in results]

    def _start(self) -> None:
        port = free_port()
        context = mp.get_context('spawn')
        self.pipes, theirs = zip(*(context.Pipe() for _ in range(self.world)))
        self.processes = [
            context.Process(target=_serve, args=(rank, self.world, port, pipe), daemon=True)
            for rank, pipe in enumerate(theirs)
        ]
        for process in self.processes:
            process.start()

    def stop(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def free_port() -> int:
    """A port that nothing listens to."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def counting():
    """The sizes of the all-reduces that SN layers ask for; those of DistributedDataParallel do not pass here."""
    sent, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda t, *args, **kwargs: (sent.append(t.numel()), all_reduce(t, *args, **kwargs))[1]
    try:
        yield sent
    finally:
        dist.all_reduce = all_reduce


def _serve(rank, world, port, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', f'tcp://127.0.0.1:{port}', datetime.timedelta(seconds=90), rank=rank, world_size=world
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
