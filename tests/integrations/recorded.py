"""A stand-in for CUDA graphs on a CPU: what torch is asked for in a call is written down, and done again with the same memory.

As in a graph, recording computes nothing that stays, a replay neither runs Python nor sees new tensors, and a call that reads a value
on the host, or brings one from there, is refused.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_REFUSED = {
    torch.ops.aten._local_scalar_dense.default: "a value is read on the host",
    torch.ops.aten.nonzero.default: "a shape depends on values",
    torch.ops.aten.lift_fresh.default: "a tensor is made from values on the host",
}


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.steps, self._before, self._own = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _REFUSED:
            raise RuntimeError(f"{_REFUSED[func]}: {func}")
        kwargs = kwargs or {}
        self._keep(func, args, kwargs)
        result = func(*args, **kwargs)
        made = [t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)]
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(t)}
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in given]
        self._own.update(t.untyped_storage().data_ptr() for t in fresh)
        self.steps.append((func, args, kwargs, made if fresh else []))
        return result

    def _keep(self, func, args, kwargs):
        """Copies of what the call writes, as it was before."""
        names = [argument.name for argument in func._schema.arguments]
        values = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in torch.utils._pytree.tree_leaves(values.get(argument.name)):
                if _is_tensor(tensor):
                    place = tensor.untyped_storage().data_ptr()
                    if place not in self._own and place not in self._before:
                        self._before[place] = tensor.untyped_storage(), tensor.untyped_storage().clone()

    def restore(self):
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self):
        for func, args, kwargs, made in self.steps:
            result = func(*args, **kwargs)
            if made:
                again = result if isinstance(result, (tuple, list)) else [result]
                for old, new in zip(made, [t for t in again if _is_tensor(t)], strict=True):
                    old.copy_(new)


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


def capture(call):
    """As dspark_kernels.integrations.transformers.captured.capture."""
    recorder = _Recorder()
    with recorder:
        result = call()
    recorder.restore()
    return result, recorder.replay
