# What kernel-builder builds from: `nix run .#build-and-copy` in a git repository of this folder.
{
  description = "dspark-kernels for the Hugging Face Hub";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    inputs:
    inputs.kernel-builder.lib.genKernelFlakeOutputs {
      inherit (inputs) self;
      path = ./.;
    };
}
