"""msfusion trains models larger than any of the machines that train them.

The whole public interface is listed here; each name is imported when it is first used, so that `import msfusion`
and the command line start fast. So are the submodules `codecs`, `data`, `engines`, `growth`, `models` and `windows`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msfusion import codecs, data, engines, growth, models, windows
    from msfusion.averaging.fusion import Accumulator, fuse
    from msfusion.averaging.robust import average
    from msfusion.batch import Batch
    from msfusion.callbacks import Callback, Checkpoints, CSVFile, EarlyStopping, Printed, TensorBoard
    from msfusion.checks import check_codec, check_engine, check_method, check_schedule
    from msfusion.data import DataSpec
    from msfusion.engines import Processes
    from msfusion.errors import (
        CheckError,
        ConfigError,
        CutError,
        DataError,
        GrowthError,
        MsfusionError,
        PrivacyError,
        UntraceableModelError,
        UpdateError,
    )
    from msfusion.federated.accounting import Privacy
    from msfusion.federated.conversation import Conversation, Request, Response
    from msfusion.federated.engine import Answer, Ask, Engine, InProcess, engine
    from msfusion.federated.method import Answered, Method, Task, Update
    from msfusion.federated.participation import Conditions, RoundSettings
    from msfusion.federated.privacy import Outbound
    from msfusion.federated.problem import METHODS, Problem, Settings, method
    from msfusion.federated.results import RoundResult
    from msfusion.federated.rounds import run_rounds
    from msfusion.federated.secure_sums import SecureSums
    from msfusion.federated.states import model_state
    from msfusion.federated.training import Training, local_steps
    from msfusion.federated.work import perform
    from msfusion.federation import Federation
    from msfusion.growth import FitSettings, LiGO, Start, fit_operator, grow
    from msfusion.methods.settings import (
        Ensemble,
        FedAvg,
        FederatedDropout,
        FedRolex,
        HeteroFL,
        MSfusion,
        Small,
        Windows,
    )
    from msfusion.predictor import Prediction, Predictor, load_predictor
    from msfusion.scoring import Scoring, loss, metric
    from msfusion.width.cut import Cut, cut
    from msfusion.width.groups import Frozen, Group, Place, WidthMap, Window
    from msfusion.width.slices import extract
    from msfusion.width.submodel import SubModel, narrow
    from msfusion.width.trace import trace
    from msfusion.windows import coverage, double_shift, full, random, rolling, schedule, static

__version__ = "0.1.0"

_HOMES = {
    "msfusion.averaging.fusion": ["Accumulator", "fuse"],
    "msfusion.averaging.robust": ["average"],
    "msfusion.batch": ["Batch"],
    "msfusion.callbacks": ["CSVFile", "Callback", "Checkpoints", "EarlyStopping", "Printed", "TensorBoard"],
    "msfusion.checks": ["check_codec", "check_engine", "check_method", "check_schedule"],
    "msfusion.data": ["DataSpec"],
    "msfusion.engines": ["Processes"],
    "msfusion.errors": [
        "CheckError",
        "ConfigError",
        "CutError",
        "DataError",
        "GrowthError",
        "MsfusionError",
        "PrivacyError",
        "UntraceableModelError",
        "UpdateError",
    ],
    "msfusion.federated.accounting": ["Privacy"],
    "msfusion.federated.conversation": ["Conversation", "Request", "Response"],
    "msfusion.federated.engine": ["Answer", "Ask", "Engine", "InProcess", "engine"],
    "msfusion.federated.method": ["Answered", "Method", "Task", "Update"],
    "msfusion.federated.participation": ["Conditions", "RoundSettings"],
    "msfusion.federated.privacy": ["Outbound"],
    "msfusion.federated.problem": ["METHODS", "Problem", "Settings", "method"],
    "msfusion.federated.results": ["RoundResult"],
    "msfusion.federated.rounds": ["run_rounds"],
    "msfusion.federated.secure_sums": ["SecureSums"],
    "msfusion.federated.states": ["model_state"],
    "msfusion.federated.training": ["Training", "local_steps"],
    "msfusion.federated.work": ["perform"],
    "msfusion.federation": ["Federation"],
    "msfusion.growth": ["FitSettings", "LiGO", "Start", "fit_operator", "grow"],
    "msfusion.methods.settings": [
        "Ensemble",
        "FedAvg",
        "FedRolex",
        "FederatedDropout",
        "HeteroFL",
        "MSfusion",
        "Small",
        "Windows",
    ],
    "msfusion.predictor": ["Prediction", "Predictor", "load_predictor"],
    "msfusion.scoring": ["Scoring", "loss", "metric"],
    "msfusion.width.cut": ["Cut", "cut"],
    "msfusion.width.groups": ["Frozen", "Group", "Place", "WidthMap", "Window"],
    "msfusion.width.slices": ["extract"],
    "msfusion.width.submodel": ["SubModel", "narrow"],
    "msfusion.width.trace": ["trace"],
    "msfusion.windows": ["coverage", "double_shift", "full", "random", "rolling", "schedule", "static"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("codecs", "data", "engines", "growth", "models", "windows")

__all__ = [
    "METHODS",
    "Accumulator",
    "Answer",
    "Answered",
    "Ask",
    "Batch",
    "CSVFile",
    "Callback",
    "CheckError",
    "Checkpoints",
    "Conditions",
    "ConfigError",
    "Conversation",
    "Cut",
    "CutError",
    "DataError",
    "DataSpec",
    "EarlyStopping",
    "Engine",
    "Ensemble",
    "FedAvg",
    "FedRolex",
    "FederatedDropout",
    "Federation",
    "FitSettings",
    "Frozen",
    "Group",
    "GrowthError",
    "HeteroFL",
    "InProcess",
    "LiGO",
    "MSfusion",
    "Method",
    "MsfusionError",
    "Outbound",
    "Place",
    "Prediction",
    "Predictor",
    "Printed",
    "Privacy",
    "PrivacyError",
    "Problem",
    "Processes",
    "Request",
    "Response",
    "RoundResult",
    "RoundSettings",
    "Scoring",
    "SecureSums",
    "Settings",
    "Small",
    "Start",
    "SubModel",
    "Task",
    "TensorBoard",
    "Training",
    "UntraceableModelError",
    "Update",
    "UpdateError",
    "WidthMap",
    "Window",
    "Windows",
    "average",
    "check_codec",
    "check_engine",
    "check_method",
    "check_schedule",
    "codecs",
    "coverage",
    "cut",
    "data",
    "double_shift",
    "engine",
    "engines",
    "extract",
    "fit_operator",
    "full",
    "fuse",
    "grow",
    "growth",
    "load_predictor",
    "local_steps",
    "loss",
    "method",
    "metric",
    "model_state",
    "models",
    "narrow",
    "perform",
    "random",
    "rolling",
    "run_rounds",
    "schedule",
    "static",
    "trace",
    "windows",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name in _SUBMODULES:
        return import_module(f"msfusion.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'msfusion' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
