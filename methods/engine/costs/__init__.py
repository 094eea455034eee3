"""Models of what hardware would need for a compressed model: cycles, energy, traffic, skipping, bit operations."""

from .summary import hardware_costs

__all__ = ["hardware_costs"]
