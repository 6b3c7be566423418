"""Every error this library raises on purpose.

    KitharaRayError
    ├── ConfigError            (ValueError)  an argument is wrong where it was written
    │   └── UnsupportedError                 a model, field or option that cannot be honoured
    ├── DataError              (ValueError)  rows, columns, tokenizer
    ├── CheckpointError        (ValueError)  the base checkpoint's files
    ├── AdapterError           (ValueError)  adapter files or arrays, gathered or read
    ├── DestinationError       (OSError)     where an export is to be written
    ├── ExportError                          an export that could not be finished or proven
    ├── PlanError                            a step that did not compile for a planned slice
    ├── ClusterError                         resources, topology, process group
    └── TrainingError                        a run that failed after it had started
        └── DivergedError                    its loss or gradient was not finite

Each holds one message and nothing else, so that it crosses process borders by pickle unchanged.
A message says what, where, what was found and what to do.
"""


class KitharaRayError(Exception):
    """Base of the tree."""


class ConfigError(KitharaRayError, ValueError):
    """An argument or a combination of arguments is wrong."""


class UnsupportedError(ConfigError):
    """A model family, configuration field or option that cannot be honoured."""


class DataError(KitharaRayError, ValueError):
    """A dataset, a row, a column or a tokenizer is unusable."""


class CheckpointError(KitharaRayError, ValueError):
    """The base checkpoint's files are missing, torn or inconsistent."""


class AdapterError(KitharaRayError, ValueError):
    """Adapter tensors or configuration do not fit together or do not fit the base."""


class DestinationError(KitharaRayError, OSError):
    """A destination cannot be written: it exists, is not empty, or is not permitted."""


class ExportError(KitharaRayError):
    """An export could not be finished or did not prove itself."""


class PlanError(KitharaRayError):
    """A step did not compile for the slice it was planned for, for another reason than memory."""


class ClusterError(KitharaRayError):
    """The cluster lacks what the run asks for, or its processes did not form a group."""


class TrainingError(KitharaRayError):
    """A run failed after training had started."""


class DivergedError(TrainingError):
    """A run's loss or gradient was not finite; the same run would come to the same end."""
