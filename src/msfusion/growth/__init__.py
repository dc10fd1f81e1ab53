"""Growth operators on the width map: from a small trained transformer to a larger one."""

from msfusion.growth.copying import Copy
from msfusion.growth.correspondence import correspond
from msfusion.growth.fit import FitSettings, GrownModel, fit_operator
from msfusion.growth.growing import fill, grow, plan_growth
from msfusion.growth.ligo import LiGO
from msfusion.growth.plan import GrowthPlan, Space
from msfusion.growth.preserve import copying, function_difference, preserving
from msfusion.growth.starts import Start

__all__ = [
    "Copy",
    "FitSettings",
    "GrownModel",
    "GrowthPlan",
    "LiGO",
    "Space",
    "Start",
    "copying",
    "correspond",
    "fill",
    "fit_operator",
    "function_difference",
    "grow",
    "plan_growth",
    "preserving",
]
