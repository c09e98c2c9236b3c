"""A Triton driver whose launches take CPU tensors and run on the machine instead of a GPU.

Triton compiles as for a GPU of the chosen architecture as far as PTX; `ptxas` is left out, the "binary" is the PTX text. Compiled
kernels go to a cache of their own, never to the one that a real GPU reads.
"""

from __future__ import annotations

import dataclasses
import os
import struct

from . import carries, core, launching, reductions

MULTIPROCESSORS = 4  # few, so that grids that follow them stay small
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}


def install(arch: str = "sm_80", project: bool = True) -> None:
    """Let this process compile for `arch` and launch on the machine. To be called before the first kernel is defined.

    project: let dspark_kernels, too, take CPU tensors and choose its launches for `arch`.
    """
    if arch not in SHARED_MEMORY:
        raise ValueError(f"arch: expected one of {', '.join(SHARED_MEMORY)}, got {arch}")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(core.cache_folder() / "triton")
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    triton.knobs.runtime.interpret = False
    CUDABackend.make_cubin = lambda self, src, *_: src.encode()
    make_llir = CUDABackend.make_llir

    def make_checked_llir(self, src, *rest):
        if found := reductions.wrong(str(src)):
            raise core.MachineError(f"Triton compiles these reductions wrongly: {'; '.join(found)}")
        return make_llir(self, src, *rest)

    CUDABackend.make_llir = make_checked_llir
    carries.refuse()
    driver.set_active(_driver(arch))
    if project:
        from dspark_kernels.launch import arch as archs

        archs._override = dataclasses.replace(archs.KNOWN[arch], multiprocessors=MULTIPROCESSORS)


def _driver(arch: str):
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Machine(DriverBase):
        launcher_cls = Launcher

        def __init__(self):
            self.utils = _Utils(arch)

        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_current_device(self):
            return 0

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device=0):
            return 0

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_device_interface(self):
            return torch.cpu

        def get_benchmarker(self):
            raise NotImplementedError("the machine counts, it does not time")

        def get_empty_cache_for_benchmark(self):
            raise NotImplementedError("the machine counts, it does not time")

        def clear_cache(self, cache):
            pass

    return Machine()


class _Utils:
    """What Triton asks of a loaded binary and of a device."""

    def __init__(self, arch: str):
        self.shared_memory = SHARED_MEMORY[arch]

    def load_binary(self, name, binary, shared, device):
        kernel = core.Kernel(name, binary.decode())
        registers, spills, threads = 0, 0, 1024  # only ptxas knows the first two
        return kernel, kernel, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": self.shared_memory, "multiprocessor_count": MULTIPROCESSORS, "warpSize": 32}


class Launcher:
    """Triton makes one for every compiled kernel, and calls it for every launch."""

    def __init__(self, source, metadata):
        self.signature = list(source.signature.values())
        self.metadata = metadata

    def __call__(self, x, y, z, stream, kernel, packed, launch_metadata, enter_hook, exit_hook, *arguments):
        if x * y * z == 0:
            return
        import torch

        tensors = list(_tensors(arguments))
        scratch = None
        if self.metadata.global_scratch_size:
            scratch = torch.full((x * y * z * self.metadata.global_scratch_size,), 0xA5, dtype=torch.uint8)
            tensors.append(scratch)
        values = [_packed(kind, value) for kind, value in _flat(self.signature, arguments)]
        values += [_packed("*", scratch), _packed("*", None)]  # scratch of the kernel, and of a profiler
        how = dict(shared=self.metadata.shared, cooperative=bool(self.metadata.launch_cooperative_grid))
        launching.launch(kernel, (x, y, z), values, tensors, **how)


def _tensors(value):
    """All tensors in nested tuples of arguments."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "untyped_storage"):
        yield value
    elif hasattr(value, "base") and hasattr(value.base, "untyped_storage"):
        yield value.base  # a tensor that Triton reinterprets as another dtype


def _flat(signature, values):
    """(type, value) of every argument the binary takes: tuples taken apart, constants left out."""
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


_INTEGER_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
_FLOAT_FORMATS = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}


def _packed(kind: str, value) -> bytes:
    if kind.startswith("*"):
        address = 0 if value is None else value if isinstance(value, int) else value.data_ptr()
        return struct.pack("<Q", address)
    if kind in _INTEGER_BYTES:
        size = _INTEGER_BYTES[kind]
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if kind in _FLOAT_FORMATS:
        return struct.pack(_FLOAT_FORMATS[kind], value)
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    raise core.MachineError(f"an argument of type {kind}")
