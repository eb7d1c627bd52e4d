"""A transport for vLLM's weight transfer that works without GPUs: arrays that come with the calls themselves.

What it shares with NCCL and CUDA IPC is all but the transport: the engine's life cycle, the sender's source and client.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from actors.learner import LearnerRank
from actors.rollout import RolloutEngine

BACKEND = "handed_over"


def register():
    """Make the transport known to vLLM in this process."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        rank_offset: int
        greeting: str

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        names: list[str]
        arrays: list[np.ndarray]

    class HandedOver(WeightTransferEngine):
        init_info_cls, update_info_cls = InitInfo, UpdateInfo

        def init_transfer_engine(self, init_info):
            if init_info.greeting != "hello":
                raise ValueError(f"{init_info.greeting!r} is no greeting")

        def start_weight_update(self):
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info):  # without the synchronisation with an accelerator, which is not there
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info):
            tensors = [torch.from_numpy(array.copy()) for array in update_info.arrays]
            self.model.load_weights(list(zip(update_info.names, tensors, strict=True)))

        def finish_weight_update(self):
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self):
            pass

    WeightTransferEngineFactory.register_engine(BACKEND, HandedOver)


class ReceivingEngine(RolloutEngine):
    """A rollout engine that knows the transport."""

    def __init__(self, *arguments, **named):
        register()
        super().__init__(*arguments, **named, weight_transfer=BACKEND)


class SendingLearner(LearnerRank):
    """A learner rank that goes through a sender's calls, as vLLM's own senders do."""

    def send_by_hand(self, engines, *, bucket_bytes, break_off=False):
        """What was declared of the weights, and what was sent; breaks off with an array that does not fit."""
        from actors.native_weights import EngineClient, LearnerWeights

        client = EngineClient(engines, devices=1, seconds=60)
        client.version = self.version
        client.init_weight_transfer_engine({"rank_offset": 1, "greeting": "hello"})
        source = LearnerWeights(self.engine, bucket_bytes)
        declared = [(meta.name, str(meta.dtype), tuple(meta.shape)) for meta in source.metadata()]
        sent = []
        client.start_weight_update()
        for name, tensor in source:
            sent.append((name, str(tensor.dtype), tuple(tensor.shape)))
            array = tensor.numpy()[:-1] if break_off and len(sent) == 5 else tensor.numpy()
            client.update_weights({"names": [name], "arrays": [array]})
        client.finish_weight_update()
        return declared, sent
