"""Planning of a run on a TPU slice, without access to the slice."""

from kithara_ray.plan.chips import Slice, slice_of
from kithara_ray.plan.chooser import choose
from kithara_ray.plan.planner import plan
from kithara_ray.plan.report import Plan

__all__ = ["Plan", "Slice", "choose", "plan", "slice_of"]
