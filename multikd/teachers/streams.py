"""Teachers side by side on an accelerator, each in a stream of its own.

A small teacher at a small batch leaves most of a large GPU idle, and several fill it. What they
share is made before they part: resized images are written in the stream of the step, which every
teacher's stream waits for, and the step waits for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from multikd.types import TokenFeatures


class TeacherStreams:
    """One stream for each teacher of a process, made when it is first asked for.

    Args:
        device_module: ``Stream``, ``stream`` and ``current_stream`` of a kind of device, as
            ``torch.cuda`` has them; None takes that of the images' device.
    """

    def __init__(self, device_module: Any = None) -> None:
        self._device_module = device_module
        self._streams: dict[tuple[torch.device, str], Any] = {}

    def run(
        self,
        names: Sequence[str],
        images: Tensor,
        share: Callable[[str], object],
        run: Callable[[str], TokenFeatures],
    ) -> dict[str, TokenFeatures]:
        """Each teacher's features, to be read in the current stream like any other tensor.

        Args:
            names: of the teachers.
            images: what they are shown.
            share: makes what a teacher reads beside the images and may not be made twice.
            run: one teacher's features.
        """
        module = self._device_module or torch.get_device_module(images.device)
        here = module.current_stream(images.device)
        for name in names:
            share(name)
        found: dict[str, TokenFeatures] = {}
        for name in names:
            stream = self._stream(module, images.device, name)
            stream.wait_stream(here)
            with module.stream(stream):
                found[name] = run(name)
        for name in names:
            here.wait_stream(self._stream(module, images.device, name))
            # The memory is the side stream's: it may not be given out again while the step reads.
            found[name].map(lambda tensor: _read_in(tensor, here))
        return found

    def _stream(self, module: Any, device: torch.device, name: str) -> Any:
        if (device, name) not in self._streams:
            self._streams[device, name] = module.Stream(device)
        return self._streams[device, name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": {}}  # streams are this process's


def _read_in(tensor: Tensor, stream: Any) -> Tensor:
    tensor.record_stream(stream)
    return tensor
