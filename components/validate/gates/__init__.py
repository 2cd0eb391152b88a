"""Is the model good enough, and may its score be believed?"""

from components.validate.gates.check import check_gates, check_quality

__all__ = ["check_gates", "check_quality"]
