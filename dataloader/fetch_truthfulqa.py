"""Fetch TruthfulQA.csv, the normal data, into this folder (`make data`).

    python dataloader/fetch_truthfulqa.py            # keeps a good file that is already there
    python dataloader/fetch_truthfulqa.py --force    # fetches it again

The new file takes its place only after a complete download with the columns that SKU reads.
"""

import http.client
import sys
import urllib.error
import urllib.request
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from harmful_unlearn.cli.flag_parser import FlagParser
from harmful_unlearn.cli.flag_types import positive_number
from harmful_unlearn.cli.running import exit_code
from harmful_unlearn.data.truthfulqa import read_normal
from harmful_unlearn.errors import UserError

HERE = Path(__file__).resolve().parent
URL = "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/TruthfulQA.csv"
MAX_BYTES = 20_000_000  # the file has half a million bytes


def download(url: str, timeout: float) -> bytes:
    """The complete body of an HTTP answer.

    Raises:
        UserError: no connection, an HTTP error, no data for `timeout` seconds, fewer bytes than announced, or more
            than MAX_BYTES.
    """
    fix = "try again later, give another --url, or download the file yourself into dataloader/"
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            body = response.read(MAX_BYTES + 1)
            announced = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        raise UserError(f"{url} answers {error.code} {error.reason}: {fix}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url} cannot be fetched ({getattr(error, 'reason', error)}): {fix}") from error
    if len(body) > MAX_BYTES:
        raise UserError(f"{url} sends more than {MAX_BYTES} bytes, which is not TruthfulQA.csv: {fix}")
    if announced and len(body) < int(announced):
        raise UserError(f"{url} sent {len(body)} of {announced} bytes: {fix}")
    return body


def fetch(url: str, target: Path, timeout: float) -> int:
    """Download TruthfulQA.csv to `target` and return its number of questions.

    Raises:
        UserError: as `download`, or the file is not TruthfulQA.csv, or `target` cannot be written. A file at `target`
            then stays as it was.
    """
    body = download(url, timeout)
    partial = target.with_name(".TruthfulQA.partial.csv")
    try:
        partial.write_bytes(body)
        rows = questions_in(partial)
        if not rows:
            raise UserError(f"{url} did not send TruthfulQA.csv: give another --url")
        partial.replace(target)
    except PermissionError as error:
        raise UserError(f"{target.parent} is not writable: change its permissions, then run again") from error
    finally:
        partial.unlink(missing_ok=True)
    return rows


def questions_in(path: Path) -> int:
    """The number of questions in a TruthfulQA.csv; 0 if there is none that SKU can read."""
    try:
        return read_normal(path, seed=0).source["rows"]
    except UserError:
        return 0


def main(arguments: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default=URL, help="where to fetch it from (default: %(default)s)")
    parser.add_argument("--timeout", type=positive_number, default=30, help="read timeout in seconds")
    parser.add_argument("--force", action="store_true", help="fetch it even if a good file is there")
    flags = parser.parse_args(arguments)
    target = HERE / "TruthfulQA.csv"
    if not flags.force and questions_in(target):
        print(f"{target} is there already (--force fetches it again)")
        return
    print(f"{target}: {fetch(flags.url, target, flags.timeout)} questions")


if __name__ == "__main__":
    sys.exit(exit_code(main))
