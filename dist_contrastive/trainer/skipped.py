"""`skipped.jsonl`: the samples that could not be read and what took their places, and the bound."""

import json
import sys
from pathlib import Path

from dist_contrastive import collectives
from dist_contrastive.data.stream.unreadable import Skipped, check_skipped


class SkippedLog:
    """Collects what ranks skipped. All ranks count the same samples, so all stop or none.

    Args:
        run_dir: where it is written, by one rank; what stands there counts too.
        max_skipped: different samples that may be skipped, over the whole run.
    """

    def __init__(self, run_dir: Path, max_skipped: int, is_main: bool) -> None:
        self._path = run_dir / "skipped.jsonl"
        self._max_skipped = max_skipped
        self._is_main = is_main
        with collectives.raised_together():
            mine = self._read() if is_main else []
        self._known: list[Skipped] = collectives.gather_objects(mine)[0]

    def __len__(self) -> int:
        """Different samples that were skipped, before a resume too."""
        return len({one.sample for one in self._known})

    def add(self, step: int, mine: list[Skipped]) -> None:
        """Write what this rank and the others skipped in a step, and check the bound.

        Raises:
            DataError: on all ranks, naming shards, when more samples were skipped than may be.

        Collectives: two gathers of objects.
        """
        found = [one for part in collectives.gather_objects(mine) for one in part]
        before = {one.sample for one in self._known}
        new = {one.sample: one for one in found if one.sample not in before}.values()
        self._known += found
        with collectives.raised_together():
            if self._is_main:
                rows = [{"step": step, **one._asdict()} for one in found]
                with self._path.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                for one in new:
                    print(f"skipped a sample: {one.reason}", file=sys.stderr, flush=True)
        check_skipped(self._known, self._max_skipped)

    def _read(self) -> list[Skipped]:
        if not self._path.exists():
            return []
        rows = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [Skipped(**{name: row[name] for name in Skipped._fields}) for row in rows]
