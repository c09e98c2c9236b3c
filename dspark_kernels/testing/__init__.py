"""Tools for tests of the kernels and of engines that use them."""
