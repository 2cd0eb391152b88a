"""What judges a model inside the child process: numpy and onnxruntime alone.

The child knows this package by another name (:mod:`components.smoke_test.child`), so its modules
import each other relatively, and nothing of assay.
"""
