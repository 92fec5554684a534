"""Build, save, load and measure Hugging Face models."""
