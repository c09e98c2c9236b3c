"""How a kernel is compiled: the options of its launch, from its configuration in dspark_kernels/launch."""


def options_of(config, fuse: bool = False) -> dict:
    """fuse: whether a product and a sum may be rounded once. Only where no bits are promised."""
    options = dict(num_warps=config.num_warps, enable_fp_fusion=fuse)
    if hasattr(config, "num_stages"):
        options["num_stages"] = config.num_stages
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options
