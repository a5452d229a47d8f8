"""Signals and agreement between ranks."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing

from momo.errors import DataError
from momo.pretrain.control import Control, StopRequest, lost_rank


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_remembered_and_handlers_come_back(number):
    before = signal.getsignal(number)
    request = StopRequest()
    with request.listening():
        assert request.name is None
        os.kill(os.getpid(), number)
        assert request.name == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
    request = StopRequest()
    with request.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("order", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_one_ctrl_c_that_comes_twice_is_one(order):
    request = StopRequest()
    with request.listening():
        for number in order:
            os.kill(os.getpid(), number)
        assert request.name == "SIGINT"


def test_no_handlers_are_taken_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def inner() -> None:
        with StopRequest().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inner)
    thread.start()
    thread.join()
    assert seen == [before]


def test_one_rank_agrees_with_itself():
    control = Control(0, 1, 5)
    assert control.any(True, False) == (True, False)
    assert control.gather("x") == ["x"] and control.share(3) == 3 and control.do_on_main(lambda: 7) == 7


def _ranks(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    control = Control(rank, ranks, 30)
    assert control.any(rank == 1, False) == (True, False)
    assert control.gather(rank * 10) == [0, 10] and control.share(f"from {rank}") == "from 0"
    assert control.do_on_main(lambda: "done") == "done"

    def fail() -> None:
        raise DataError("the disk is full", seen="/d", rule="room", fix="make room")

    try:
        control.do_on_main(fail)
    except DataError as error:
        Path(folder, f"told-{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_two_ranks_agree_and_share_errors(tmp_path):
    torch.multiprocessing.start_processes(_ranks, args=(2, str(tmp_path)), nprocs=2, start_method="spawn")
    told = [(tmp_path / f"told-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1] == "the disk is full: /d. Rule: room. Next: make room."


def test_lost_connections_are_told_from_bugs():
    lost = lost_rank(
        RuntimeError("[gloo/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), "rank 1 at 64 samples"
    )
    assert lost is not None
    assert str(lost).startswith("the connection to another rank was lost: rank 1 at 64 samples: [gloo")
    assert lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "rank 0") is None
