"""Weights from the learner's device to those of the engines by vLLM's own weight transfer: NCCL, or CUDA IPC where
learner and engine share a device.

Every learner rank holds a sender of vLLM's; that of rank 0 drives the engines through `EngineClient`, the others take
part in gathering. None of this has been run on GPUs yet; what is tested is the sequence of calls from a real learner
into a real engine, with a transport of the tests' own. This module imports vLLM, which takes seconds: import it where
it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import ray
import torch
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from learner.engine import LearnerEngine


class LearnerWeights(WeightSource):
    """The learner's weights on its device, bucket after bucket, a fresh pass each time; every rank goes through them.

    Under ZeRO 3 all ranks gather a bucket together, and rank 0 has copies of it, for a packed buffer may outlive the
    gathered parameters. Low-rank weights are merged in.
    """

    def __init__(self, engine: LearnerEngine, bucket_bytes: int) -> None:
        self.engine, self.bucket_bytes = engine, bucket_bytes

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of everything that iteration gives, in its order, without gathering."""
        return [ParamMeta(name, dtype, shape) for name, dtype, shape in self.engine.weight_shapes()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        sent = {name for name, _, _ in self.engine.weight_shapes()}
        for bucket in self.engine.weight_buckets(self.bucket_bytes, on_host=False):
            yield from (pair for pair in bucket if pair[0] in sent)


class EngineClient:
    """vLLM's client protocol over rollout actors: every call goes to all of them and has a deadline.

    Args:
        engines: handles of the actors.
        devices: of each engine, which take their ranks in the transfer after the learner's rank 0.
        seconds: deadline of a call.
    """

    def __init__(self, engines: list[Any], *, devices: int, seconds: float) -> None:
        self.engines, self.devices, self.seconds = engines, devices, seconds
        self.version = 0  # of the weights that are sent next

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [
            init_info | ({"rank_offset": 1 + number * self.devices} if "rank_offset" in init_info else {})
            for number in range(len(self.engines))
        ]
        self._all([one.join_weight_transfer.remote(info) for one, info in zip(self.engines, infos, strict=True)])

    def start_weight_update(self) -> None:
        self._all([one.start_weight_transfer.remote(self.version) for one in self.engines])

    def update_weights(self, update_info: Any) -> None:
        self._all([one.receive_weights.remote(update_info) for one in self.engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all([one.finish_weight_transfer.remote(self.version) for one in self.engines])

    def _all(self, calls: list[ray.ObjectRef]) -> None:
        ready, late = ray.wait(calls, num_returns=len(calls), timeout=self.seconds)
        if late:
            names = ", ".join(str(calls.index(call)) for call in late)
            raise TimeoutError(
                f"rollout engine {names} did not take part in the weight transfer within {self.seconds} s"
            )
        ray.get(ready)


def weight_sender(
    backend: Literal["nccl", "ipc"], engine: LearnerEngine, client: EngineClient, *, meeting_place: tuple[str, int],
    bucket_bytes: int,
) -> TrainerWeightTransferEngine:  # fmt: skip
    """The sender of this rank, connected with all engines; every learner rank calls this together.

    Args:
        meeting_place: address and port of learner rank 0, where the devices of the engines find it (NCCL).
    """
    if not torch.cuda.is_available():
        raise ValueError(f"cluster.weight_transfer {backend} needs GPUs, and this rank of the learner has none")
    address, port = meeting_place
    init_info: Any
    if backend == "nccl":
        devices = 1 + client.devices * len(client.engines)
        init_info = NCCLTrainerInitInfo(address, port, devices, packed_buffer_size_bytes=bucket_bytes, rank=engine.rank)
    else:
        init_info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=bucket_bytes, rank=engine.rank)
    source = LearnerWeights(engine, bucket_bytes)
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
