"""All errors that this library raises on purpose.

    KitharaRayError
    ├── ConfigError            (ValueError)  an argument is wrong
    │   └── UnsupportedError                 a model, field or option is not supported
    ├── DataError              (ValueError)  rows, columns or the tokenizer are unusable
    ├── CheckpointError        (ValueError)  the base checkpoint's files are unusable
    ├── AdapterError           (ValueError)  adapter files or arrays are unusable
    ├── DestinationError       (OSError)     an export's destination cannot be written
    ├── ExportError                          an export could not be finished or verified
    ├── PlanError                            a step did not compile for a planned slice
    ├── ClusterError                         resources, topology or process group are wrong
    └── TrainingError                        a run failed after it had started
        └── DivergedError                    its loss or gradient was not finite

Each error holds only one message, so that pickle carries it unchanged between processes.
A message states the fault, its place, the value found and the remedy.
"""


class KitharaRayError(Exception):
    """Base of the tree."""


class ConfigError(KitharaRayError, ValueError):
    """An argument or a combination of arguments is wrong."""


class UnsupportedError(ConfigError):
    """A model family, configuration field or option is not supported."""


class DataError(KitharaRayError, ValueError):
    """A dataset, a row, a column or a tokenizer is unusable."""


class CheckpointError(KitharaRayError, ValueError):
    """The base checkpoint's files are missing, damaged or inconsistent."""


class AdapterError(KitharaRayError, ValueError):
    """Adapter tensors or configuration do not match each other or the base."""


class DestinationError(KitharaRayError, OSError):
    """A destination cannot be written: it exists, is not empty, or is not permitted."""


class ExportError(KitharaRayError):
    """An export could not be finished or failed verification."""


class PlanError(KitharaRayError):
    """A step did not compile for its planned slice, for a reason other than memory."""


class ClusterError(KitharaRayError):
    """The cluster lacks resources that the run requests, or its processes did not form a group."""


class TrainingError(KitharaRayError):
    """A run failed after training had started."""


class DivergedError(TrainingError):
    """A run's loss or gradient was not finite; repeating the run would give the same result."""
