"""Are the gradients right, and does a training step do what it says?"""

from components.validate.gradients.verify import verify_gradients

__all__ = ["verify_gradients"]
