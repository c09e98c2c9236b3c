"""What a call asks of torch besides views, ops of the package, and gathers."""

from torch.utils._python_dispatch import TorchDispatchMode


class Asked(TorchDispatchMode):
    """found: names of torch's operators that ran inside, in order."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.namespace not in ("dspark_kernels", "c10d") and not function.is_view:
            self.found.append(str(function))
        return function(*arguments, **named or {})

    def __enter__(self):
        self.found = []
        return super().__enter__()
