"""python -m hub: the package in the form that Hugging Face's `kernels` loads."""
