"""8-bit kernels: a table of providers, and the measured choice between them and the kernel in the user's precision."""

from .choose import Chooser, Timed, chooser, times_ms
from .gpu import MeasuredChooser
from .onednn import CpuChooser
from .problem import NARROW, Choice, Problem, of_layer
from .providers import CAPABILITY, PROVIDERS, Provider, installed, missing, provider, register
from .timing import Unsteady, graph_ms

__all__ = ["CAPABILITY", "NARROW", "PROVIDERS", "Choice", "Chooser", "CpuChooser", "MeasuredChooser", "Problem", "Provider",
           "Timed", "Unsteady", "chooser", "graph_ms", "installed", "missing", "of_layer", "provider", "register", "times_ms"]
