"""Objects in a column of a data set as the text of their JSON: Arrow would give each the keys of all others."""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datasets import Json, LargeList, List
from datasets.features.features import register_feature


@dataclass(repr=False)
class JsonText(Json):
    """The feature `Json`, with numbers read as `json` reads them: that of `datasets` is off in the last digit of some.

    A text among the values is itself, and not JSON that somebody has written already.
    """

    _type: str = field(default="JsonText", init=False, repr=False)

    def encode_example(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False)

    def decode_example(self, value: str | None, token_per_repo_id: dict | None = None) -> Any:
        return None if value is None else json.loads(value)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # that it is experimental
    register_feature(JsonText, JsonText.__name__)


def encoded(value: Any, feature: Any) -> Any:
    """What a map is to return for a column of this feature: `datasets` would write JSON with ten digits."""
    if value is None:
        return None
    if isinstance(feature, Json):
        return feature.encode_example(value)
    return [encoded(part, feature.feature) for part in value] if isinstance(feature, List) else value


def values(column: pa.ChunkedArray, feature: Any) -> list[Any]:
    """A column's values as they were before Arrow gave each object the keys of all others: without those of no value.

    A null that somebody wrote there cannot be told from Arrow's, and goes, too; in JSON it stays.
    """
    return [plain(value, feature) for value in column.to_pylist()]


def plain(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.loads(value)
    if isinstance(feature, dict):
        return {key: plain(part, feature[key]) for key, part in value.items() if part is not None}
    if isinstance(feature, List | LargeList):
        return [plain(part, feature.feature) for part in value]
    return value
