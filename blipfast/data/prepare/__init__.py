"""From a data set's own published files to shards with one record schema.

`DATA_SETS` names them; `prepare` writes one split of one.
"""

from blipfast.data.prepare import captions, folder, questions, video, web
from blipfast.data.prepare.source import DataSet, Split
from blipfast.data.prepare.write import Prepared, prepare_split
from blipfast.errors import DataError

__all__ = ["DATA_SETS", "DataSet", "Prepared", "Split", "data_set", "prepare_split"]

DATA_SETS: dict[str, DataSet] = {
    one.name: one for one in (*captions.SETS, *web.SETS, *questions.SETS, *video.SETS, *folder.SETS)
}


def data_set(name: str) -> DataSet:
    """A data set by its name. Raises DataError naming those that there are."""
    if name not in DATA_SETS:
        raise DataError(f"unknown data set {name!r}; there are {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
