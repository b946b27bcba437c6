"""Distribution Matching Distillation: a many-step diffusion teacher becomes a one-step student."""

__version__ = "0.1.0"
