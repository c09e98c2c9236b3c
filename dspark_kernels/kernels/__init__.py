"""The Triton kernels: jit code and its bare launchers, without checks, types or registration."""
