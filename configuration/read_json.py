"""Reads JSON files; what is wrong with one is a line for its user. Also makes data fit for JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from recollect.configuration.base import UserError


def finite(data: Any) -> Any:
    """Returns JSON-ready data with None for each number that is not finite."""
    if isinstance(data, dict):
        return {str(name): finite(entry) for name, entry in data.items()}
    if isinstance(data, list | tuple):
        return [finite(entry) for entry in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
      UserError: the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({type(error).__name__})") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      UserError: as `read_json`, or it holds something else.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold one JSON object, not {type(data).__name__}")
    return data
