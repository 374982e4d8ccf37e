"""The device that computes: how much memory it has left, and which rank of how many this process is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_quantize.errors import InputError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run computes.

    torch: the PyTorch device. memory_limit: GiB of device memory that the process may use, None for all there is.
    rank: of this process, of `world_size`.
    """

    torch: torch.device
    memory_limit: float | None = None
    rank: int = 0
    world_size: int = 1

    @classmethod
    def pick(cls, asked: str, memory_limit: float | None = None) -> Device:
        """The device that `auto`, `cpu`, `cuda` or `cuda:N` names, with a limit set on its memory.

        Raises InputError where it is not there, and for a limit on the CPU.
        """
        device = _existing(asked)
        if memory_limit is not None:
            if device.type != "cuda":
                raise InputError("--max_memory limits GPU memory and the run is on the CPU: leave it out")
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit * GIB / total), device)
        return cls(device, memory_limit)

    def __str__(self) -> str:
        return str(self.torch)

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU; else it is the CPU."""
        return self.torch.type == "cuda"

    @property
    def name(self) -> str:
        """The GPU's product name, or `cpu`."""
        return torch.cuda.get_device_name(self.torch) if self.is_gpu else self.torch.type

    def free_memory(self) -> float:
        """Bytes of device memory that are free to this process. For a GPU."""
        used = torch.cuda.memory_allocated(self.torch)
        free = float(torch.cuda.mem_get_info(self.torch)[0] + torch.cuda.memory_reserved(self.torch) - used)
        return free if self.memory_limit is None else max(0.0, min(free, self.memory_limit * GIB - used))

    def has_room(self, needed: float) -> bool:
        """Whether `needed` bytes are free; on the CPU they always are."""
        return not self.is_gpu or needed < self.free_memory()

    def start_statistics(self) -> None:
        """Make it the current device and forget how much memory has been used at most."""
        if self.is_gpu:
            torch.cuda.set_device(self.torch)
            torch.zeros((), device=self.torch)  # the statistics exist once the device is in use
            torch.cuda.reset_peak_memory_stats(self.torch)

    def peak_memory(self) -> int:
        """Bytes of device memory that tensors took at most since `start_statistics`; 0 on the CPU."""
        return torch.cuda.max_memory_allocated(self.torch) if self.is_gpu else 0

    def synchronize(self) -> None:
        """Wait for all work that the device has been given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.torch)


def _existing(asked: str) -> torch.device:
    kind, _, number = asked.partition(":")
    if asked not in ("auto", "cpu") and (kind != "cuda" or (":" in asked and not number.isdecimal())):
        raise InputError(f"--device {asked}: take auto, cpu, cuda or cuda:N")
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"--device {asked}: no GPU that PyTorch can use; take --device cpu, or check the driver"
        )
    if int(number or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {asked}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return torch.device("cuda", int(number or 0))
