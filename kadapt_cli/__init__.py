"""kadapt: adapt pretrained vision transformers to image classification with very few trained parameters."""

__version__ = "0.1.0"
