"""What each method does, and what a user chooses of it. Importing this registers the methods of the house.

A method is registered where its settings are declared (`federated.problem.method`), and there is no other list of
names. The order of the imports is that in which they are told.
"""

from msfusion.federated.problem import METHODS
from msfusion.methods import settings as _settings  # noqa: F401

# isort: split
from msfusion.methods.split import method as _split  # noqa: F401

# isort: split
from msfusion.methods.fedgrow import settings as _fedgrow  # noqa: F401

HOUSE = tuple(name for name in METHODS if METHODS[name].__module__.startswith(f"{__name__}."))
"""The names of the methods of the house, without those that a program has registered."""
