"""GPU kernels: one file each, with a torch reference beside it. docs/kernels.md lists them."""

# transformers looks for a Hugging Face package that is also called `kernels` and reads its version;
# ours must lie outside the range it accepts, so that it never takes this folder for that package.
__version__ = "0.1.0"
