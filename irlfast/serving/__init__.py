"""A learned reward behind HTTP: JSON in, numbers out, judged in batches, replaced without a request lost.

requests.py    JSON bodies as rows to judge, and scores as JSON
batcher.py     a bounded queue, and batches that form while the model is busy
live.py        the reward in service, the check of a new one and the exchange
metrics.py     counters and histograms as Prometheus reads them
app.py         routes, access, errors
run.py         socket, signals, an end that answers what it took
"""

from .app import AppOptions
from .batcher import Batcher, QueueFullError
from .live import LiveReward, LoadOptions, ReloadError, ServedReward, load
from .run import ServerOptions, serve

__all__ = [
    "AppOptions",
    "Batcher",
    "LiveReward",
    "LoadOptions",
    "QueueFullError",
    "ReloadError",
    "ServedReward",
    "ServerOptions",
    "load",
    "serve",
]
