"""Removes each guard of the promises, one at a time, and shows which test notices.

    python tests/guards.py [NAME ...]

It works on a copy of the tree. A guard whose removal no test notices ends the command with 1: it is
a missing test, or a needless guard.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).parent.parent
JOBS = os.cpu_count() or 1
_HANGS_SECONDS = 120.0  # the slowest takes about 25


@dataclass(frozen=True)
class Guard:
    """`old` in the file is replaced by `new`; one of the tests must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: str


GUARDS = [
    # Durable, and in this order
    Guard(
        "a directory is fsynced",
        "storage.py",
        '        with _storage_errors("fsync", directory):\n'
        "            _sync_directory(directory)\n",
        "            pass\n",
        "tests/test_checkpointer.py -k fsynced",
    ),
    Guard(
        "files are fsynced before the marker",
        "save.py",
        '        store.sync(self._staging, sorted(f"{prefix}{key}" for key in written))\n',
        "",
        "tests/test_explorer.py -k dies",
    ),
    Guard(
        "the name of a step is fsynced",
        "storage.py",
        "            for directory in {os.path.dirname(target), os.path.dirname(self.path(source))}:\n                _sync_directory(directory)\n",
        "",
        'tests/test_power.py -k "each_fsync and rename"',
    ),
    Guard(
        "what a write that was cut off leaves is no key",
        "storage.py",
        "                    if not _TEMPORARY.fullmatch(e.name)\n",
        "",
        "tests/test_power.py -k two_hosts",
    ),
    Guard(
        "the marker goes first: nothing of a step is deleted before it is out of sight",
        "retention.py",
        "        _move_into(store, step, name, aside, lease)\n        name = aside\n",
        '        store.delete(f"{own}/state")\n        _move_into(store, step, name, aside, lease)\n        name = aside\n',
        "tests/test_explorer.py -k dies",
    ),
    Guard(
        "the marker goes first, in a bucket: nothing is deleted before a void one has its place",
        "retention.py",
        "    if old is None:\n        is_mine = store.create(marker, void)\n",
        '    store.delete(f"{name}/state")\n    if old is None:\n        is_mine = store.create(marker, void)\n',
        "tests/test_explorer.py -k dies",
    ),
    Guard(
        "a step that is replaced is renamed aside",
        "publish.py",
        "            store.rename(staged.name, staged.aside)\n",
        "            store.delete(staged.name)\n",
        "tests/test_explorer.py -k dies",
    ),
    Guard(
        "the primary waits for all records",
        "save.py",
        'rows = self.operation.gather("written", self._deadline)',
        'rows = list(self.operation._board.read(f"{self.operation._prefix}written/").values()) and []',
        "tests/test_protocol.py -k marker_is_the_last",
    ),
    Guard(
        "the listing is compared with what the hosts have written",
        "save.py",
        "len(files) == len(listing) and self._tally(files.values()) == expected",
        "True",
        "tests/test_protocol.py -k stops_the_commit",
    ),
    Guard(
        "where it differs, it is compared with the records",
        "save.py",
        "        check_listing(store, staging, Staged(self.run, self.step, self._nonce, staging, written))\n",
        "",
        "tests/test_protocol.py -k stops_the_commit",
    ),
    Guard(
        "all hosts compress what host 0 has chosen",
        "arrays/engine.py",
        "Choice.from_json(choice)",
        "self._engine.choose()",
        "tests/test_compression.py -k all_hosts",
    ),
    Guard(
        "a limit of bytes that cannot be kept is said",
        "arrays/engine.py",
        "    if size >= limit:",
        "    if False:",
        "tests/test_compression.py -k limit",
    ),
    Guard(
        "hosts are gathered in few reads",
        "hosts.py",
        "missing[len(missing) // 2]",
        "missing[0]",
        "tests/test_scale.py -k few_reads",
    ),
    Guard(
        "host 0 of thousands does not read the record of each",
        "save.py",
        "written = self._listed(expected) or self._recorded(records)",
        "written = self._recorded(records)",
        "tests/test_scale.py -k no_more_messages",
    ),
    Guard(
        "of many hosts one lists the whole step",
        "restore.py",
        "whole = group.is_primary or not (renames or marker.hosts > _FEW_HOSTS)",
        "whole = True",
        "tests/test_scale.py -k as_much_to_do",
    ),
    # All hosts alike
    Guard(
        "hosts vote on a step that is restored",
        "restore.py",
        '            wrong = self._group.exchange(\n                "verify",',
        '            self._group.exchange(\n                "verify",',
        "tests/test_protocol.py -k one_host_sees",
    ),
    Guard(
        "what no loader has verified is verified after it",
        "restore.py",
        'wrong = verify_files(self._store, candidate.name, loading.take(), "full", whole=False)',
        "wrong: dict[str, str] = {}",
        "tests/test_damage.py -k metadata_alone",
    ),
    Guard(
        "what is read is what was recorded",
        "direct/reading.py",
        "        return None if digester.text() == entry.digest else",
        "        return None if digester.text() else",
        "tests/test_direct.py -k digest",
    ),
    Guard(
        "what is recorded is what was written, and not what is there",
        "save.py",
        "        entries |= {key: fmt.FileEntry(key, *found) for key, found in known.items()}\n",
        "        known = {}\n",
        "tests/test_direct.py -k recorded_and_not",
    ),
    Guard(
        "of several files the one that failed is told",
        "direct/writing.py",
        "        for future in ended:\n            future.result()  # what was stopped for it has no error of its own\n",
        "",
        "tests/test_direct.py -k several_files",
    ),
    Guard(
        "a chunk is what was written",
        "direct/layout.py",
        "    return tail[4:] == right[4:] and (crc is None or tail[:4] == right[:4])\n",
        "    return tail[4:] == right[4:]\n",
        "tests/test_damage.py -k whatever_the_level",
    ),
    Guard(
        "the index of the arrays names no file outside",
        "ocdbt.py",
        'if kind != "value" or any(part in ("", ".", "..") for part in parts):',
        "if False:",
        "tests/test_direct.py -k outside",
    ),
    Guard(
        "the first decision stands",
        "boards.py",
        "            if key in rows:\n                return False\n",
        "",
        "tests/test_conformance.py -k simulated",
    ),
    Guard(
        "who waits in vain does not say that nothing was committed",
        "hosts.py",
        'begin, known="")\n                # From',
        "begin, known=phase)\n                # From",
        "tests/test_protocol.py -k wait_in_vain",
    ),
    Guard(
        "a marker is looked at again after loading",
        "restore.py",
        '                if told["moved"]:\n                    raise _MovedError\n',
        "",
        "tests/test_interleavings.py -k restores",
    ),
    # In a bucket
    Guard(
        "a nonce is read back when a reply is lost",
        "buckets.py",
        "        except FileExistsError:\n            return self._holds(key, data)\n        return True\n\n    def replace",
        "        except FileExistsError:\n            return False\n        return True\n\n    def replace",
        "tests/test_buckets.py -k lost_reply",
    ),
    Guard(
        "hosts gather the same",
        "restore.py",
        "                _check_alike([gathers for _, gathers in votes])\n",
        "                pass\n",
        "tests/test_replicas.py -k different_things",
    ),
    Guard(
        "what is gathered keeps its bits",
        "arrays/replicas.py",
        "            if jax.numpy.issubdtype(dtype, jax.numpy.floating):\n",
        "            if False:\n",
        "tests/test_replicas.py -k half_of",
    ),
    Guard(
        "what is gathered is gathered before anything is applied",
        "restore.py",
        "                self._gather(attempt.loading)\n",
        "                pass\n",
        "tests/test_replicas.py -k all_gather",
    ),
    Guard(
        "a failed upload lets go of its buffer",
        "arrays/engine.py",
        "    _release_views_of_failed_uploads()\n",
        "",
        "tests/test_buckets.py -k lets_go",
    ),
    Guard(
        "what a failed upload was caused by lets go of it, too",
        "arrays/engine.py",
        "found = found.__cause__ or found.__context__",
        "found = None",
        "tests/test_buckets.py -k lets_go",
    ),
    Guard(
        "an object is replaced on its generation",
        "buckets.py",
        "self._upload(key, data, ifGenerationMatch=generation)",
        "self._upload(key, data)",
        "tests/test_conformance.py -k bucket_store",
    ),
    Guard(
        "nothing is copied onto something",
        "buckets.py",
        '                        ifGenerationMatch="0",\n                        read=read,',
        "                        read=read,",
        "tests/test_conformance.py -k bucket_store",
    ),
    Guard(
        "a step is replaced only as it was before it was copied aside",
        "publish.py",
        "    if not store.replace(key, old, void, seen=seen):",
        "    if not store.replace(key, old, void):",
        "tests/test_leftovers.py",
    ),
    Guard(
        "as it was before, and not after",
        "publish.py",
        "    return old, seen\n",
        "    return old, store.list(f'{name}/{fmt.COMMIT_NAME}')[0]\n",
        "tests/test_leftovers.py -k in_turn",
    ),
    Guard(
        "a step's marker is written once more before a copy of it goes",
        "retention.py",
        "== digest and store.replace(key, marker, marker)",
        "== digest",
        "tests/test_leftovers.py -k whatever_who_replaces",
    ),
    Guard(
        "where it could not be written once more the copy stays",
        "retention.py",
        "== digest and store.replace(key, marker, marker)",
        "== digest and (store.replace(key, marker, marker) or True)",
        "tests/test_leftovers.py -k in_turn",
    ),
    Guard(
        "a copy stays while the step is being replaced",
        "retention.py",
        "        if replaced:\n            return False  # the save",
        "        if False:\n            return False  # the save",
        "tests/test_leftovers.py",
    ),
    Guard(
        "a marker that speaks for nothing is no step",
        "retention.py",
        "return _write_once_more(store, found.name, found.digest)",
        "return _write_once_more(store, found.name, fmt.digest(store.get(f'{step}/COMMIT.json')))",
        "tests/test_leftovers.py -k speaks_for_nothing",
    ),
    Guard(
        "a void marker stays beside a copy that is the step",
        "retention.py",
        "leftover.abandoned and not _is_aside(store, step)",
        "leftover.abandoned",
        "tests/test_leftovers.py -k copy_is_the_step",
    ),
    Guard(
        "a void marker stays beside a copy that is the step, for longer than a day",
        "retention.py",
        "if old and not hides else None",
        "if old else None",
        "tests/test_leftovers.py -k copy_is_the_step",
    ),
    Guard(
        "who drops its copy asks twice",
        "retention.py",
        "    for _ in range(2):  # what is there may go",
        "    for _ in range(1):  # what is there may go",
        "tests/test_leftovers.py -k is_dropped",
    ),
    Guard(
        "what is copied aside is what its marker speaks for",
        "publish.py",
        "    if store.list(key) == [seen]:\n",
        "    if True:\n",
        "tests/test_leftovers.py -k two_versions",
    ),
    Guard(
        "the marker that was read is the one that was listed",
        "publish.py",
        "    if seen.digest != fmt.digest(old, store.digest_kind):\n        raise _not_aside(store, staged)\n",
        "",
        "tests/test_leftovers.py -k two_versions",
    ),
    Guard(
        "a void marker is not taken for one that stands alone",
        "retention.py",
        " or _nonce(store, name) is None:",
        ":",
        "tests/test_leftovers.py -k under_way",
    ),
    Guard(
        "what is taken back is nobody else's",
        "publish.py",
        'if ours() and store.create(f"{name}/{fmt.COMMIT_NAME}", void):',
        "if ours():",
        "tests/test_leftovers.py -k another_save_has",
    ),
    Guard(
        "what nobody would know is taken back",
        "publish.py",
        "            _withdraw(store, staged, now)\n",
        "            pass\n",
        "tests/test_leftovers.py -k taken_back",
    ),
    Guard(
        "a marker that stood alone is looked at again before it goes",
        "retention.py",
        "    if store.children(name) != [fmt.COMMIT_NAME] or _nonce",
        "    if _nonce",
        "tests/test_leftovers.py -k stood_alone",
    ),
    Guard(
        "it goes as it was listed before that",
        "retention.py",
        "    store.delete_listed(listed)  # unless",
        "    store.delete_listed(store.list(f'{name}/{fmt.COMMIT_NAME}'))  # unless",
        "tests/test_leftovers.py -k stood_alone",
    ),
    Guard(
        "who takes the run over reads the leases when its own is there",
        "lease.py",
        "for lease in _all(store) if lease.epoch < mine.epoch]",
        "for lease in seen]",
        "tests/test_lease.py -k announced",
    ),
    Guard(
        "a copy that has come meanwhile is deleted by who has the run alone",
        "retention.py",
        'store.children(""), now, lease) and is_gone',
        'store.children(""), now, _UNGUARDED) and is_gone',
        "tests/test_lease.py -k comes_while",
    ),
    Guard(
        "the deletion of a copy that is the step is announced",
        "retention.py",
        "        is_the_step = True\n",
        "        pass\n",
        "tests/test_lease.py -k is_a_copy",
    ),
    Guard(
        "who takes the run over writes the markers of such copies once more",
        "retention.py",
        "for name in (fmt.step_name(step), *_asides(step, names)):",
        "for name in (fmt.step_name(step),):",
        "tests/test_lease.py -k is_a_copy",
    ),
    Guard(
        "a step whose copy is not gone is not, either",
        "retention.py",
        'store.children(""), now, lease) and is_gone',
        'store.children(""), now, lease) or is_gone',
        "tests/test_leftovers.py -k told_as_deleted",
    ),
    Guard(
        "a step that is not gone is not told as deleted",
        "checkpointer.py",
        "        if not delete_step(self._store, step, now=now, lease=lease):",
        "        if not delete_step(self._store, step, now=now, lease=lease) and False:",
        "tests/test_checkpointer.py -k is_not_gone",
    ),
    Guard(
        "a copy that does not say whose it is is known by its step",
        "retention.py",
        " or _run_of(store, name) or _run_of(store, fmt.step_name(step))",
        " or _run_of(store, name)",
        "tests/test_leftovers.py",
    ),
    Guard(
        "the copy has its marker last",
        "publish.py",
        "    rest = [path for path in entries if path not in (claim, fmt.COMMIT_NAME)]\n",
        "    rest = [path for path in entries if path != claim][::-1]\n",
        "tests/test_leftovers.py",
    ),
    Guard(
        "a void marker stays where a primary may go on copying aside",
        "retention.py",
        "    stays = _may_be_copied_to(store, name, step)\n",
        "    stays = False\n",
        "tests/test_leftovers.py",
    ),
    Guard(
        "a copy that is the step is not dropped",
        "publish.py",
        "        if is_committed(store, staged.name):\n            retention.delete_copy",
        "        if True:\n            retention.delete_copy",
        "tests/test_leftovers.py",
    ),
    Guard(
        "who drops its copy puts a void marker there first",
        "publish.py",
        "            retention.delete_copy(store, staged.run, staged.step, staged.aside)\n        if isinstance",
        "            store.delete(staged.aside, last=fmt.STEP_NAME)\n        if isinstance",
        "tests/test_leftovers.py",
    ),
    Guard(
        "of several directories that were a step the newest counts",
        "inspection.py",
        "sorted(_one_each(judged), key",
        "sorted(judged, key",
        "tests/test_leftovers.py",
    ),
    Guard(
        "all that was the step before goes with the commit",
        "save.py",
        "                retention.delete_replaced(self._store, self.step, own, names, now)\n",
        "",
        "tests/test_interleavings.py -k killed",
    ),
    Guard(
        "only what was listed under the void marker is deleted",
        "retention.py",
        "    if marker is None or marker.digest != fmt.digest(void, store.digest_kind):\n        return False\n",
        "",
        'tests/test_interleavings.py -k "saves and 5 and again"',
    ),
    Guard(
        "a step is claimed by one",
        "publish.py",
        '        if not store.create(f"{name}/{fmt.STEP_NAME}", staged.claim):\n            raise _other_writer(store, staged)\n',
        '        store.put(f"{name}/{fmt.STEP_NAME}", staged.claim)\n',
        "tests/test_protocol.py -k both_find_room",
    ),
    Guard(
        "the step is still there after its marker",
        "publish.py",
        "        _check_still_there(store, staged)\n",
        "",
        "tests/test_protocol.py -k stands_still",
    ),
    Guard(
        "a deletion ends when the marker is another one",
        "retention.py",
        "        return False  # saved again, or about to be; or the run is another job's\n",
        "        pass\n",
        "tests/test_leftovers.py",
    ),
    Guard(
        "what another job has taken is not copied over",
        "publish.py",
        "    if not retention.clear_given_up(store, name, void):\n        raise _other_writer(store, staged)  # now, rather than after everything was copied\n",
        "    retention.clear_given_up(store, name, void)\n",
        "tests/test_leftovers.py",
    ),
    Guard(
        "nothing is copied for a save that has failed",
        "publish.py",
        '    with phases.span("publish"):\n        check()\n        void',
        '    with phases.span("publish"):\n        void',
        "tests/test_leftovers.py",
    ),
    Guard(
        "a copy aside that nobody needs is removed",
        "publish.py",
        "            retention.delete_copy(store, staged.run, staged.step, staged.aside)\n            with contextlib",
        "            with contextlib",
        "tests/test_leftovers.py",
    ),
    Guard(
        "a listing of the run is asked for twice",
        "inspection.py",
        '        if settled and _lasting(store.children("")) == _lasting(names):',
        "        if settled:",
        "tests/test_protocol.py -k hides_no_step",
    ),
    Guard(
        "looks at steps are repeated until they agree",
        "inspection.py",
        '            or all(c.state == "committed" for c in steps)',
        "            or True",
        "tests/test_leftovers.py",
    ),
    Guard(
        "a claim outlives a staging that was removed",
        "retention.py",
        "claim, keep_claim=True)",
        "claim, keep_claim=False)",
        "tests/test_leftovers.py",
    ),
    Guard(
        "a void marker alone stays for a day",
        "retention.py",
        "now - void.at > _VOID_SECONDS",
        "True",
        "tests/test_protocol.py -k stays_for_a_day",
    ),
    Guard(
        "a restore is noted before any host begins it",
        "restore.py",
        "        self._begin(inspection, candidates)\n        return body",
        "        return body",
        "tests/test_attempts.py -k before_any_host",
    ),
    Guard(
        "a restore that lost a host stays noted",
        "restore.py",
        "                self._trial.leave()\n",
        "",
        "tests/test_attempts.py -k host_that_is_lost",
    ),
    Guard(
        "a restore that may be going on does not count",
        "attempts.py",
        "            and _has_ended(attempt, here, now)\n",
        "",
        "tests/test_attempts.py -k must_have_ended",
    ),
    Guard(
        "suspect steps only are no new start",
        "restore.py",
        "        if suspects and step is None:",
        "        if False:",
        "tests/test_attempts.py -k every_step_is_suspect",
    ),
    # One writer
    Guard(
        "the epoch is checked before a step is published",
        "save.py",
        '            self.operation.check("commit")\n            self._saver.lease.check()\n',
        '            self.operation.check("commit")\n',
        "tests/test_lease.py -k 'lost_the_run and saves'",
    ),
    Guard(
        "who takes a run over makes void what others have begun",
        "lease.py",
        "            fence(\n                run,\n                [record for record in older if record is not None],\n",
        "            (lambda *_: None)(\n                run,\n                [record for record in older if record is not None],\n",
        "tests/test_lease.py -k 'fences_again or lost_the_run'",
    ),
    Guard(
        "what a job has staged that has lost the run gets another name",
        "retention.py",
        "                with contextlib.suppress(KeyError):  # it has gone meanwhile\n",
        "                continue\n                with contextlib.suppress(KeyError):\n",
        "tests/test_lease.py -k 'lost_the_run and file and saves'",
    ),
    Guard(
        "the marker of a job that has lost the run has its place taken",
        "retention.py",
        "        if not _outdate(store, step):\n            give_up(",
        "        if _outdate(store, step) and False:\n            give_up(",
        "tests/test_lease.py -k 'lost_the_run and bucket and saves'",
    ),
    Guard(
        "nor can it replace a step that it has listed before",
        "retention.py",
        "        if not _outdate(store, step):\n            give_up(",
        "        if not is_committed(store, fmt.step_name(step)):\n            give_up(",
        "tests/test_meetings.py",
    ),
    Guard(
        "nor one that it has listed since",
        "publish.py",
        "        old, seen = _copy_aside(store, staged)\n        check()\n",
        "        old, seen = _copy_aside(store, staged)\n",
        "tests/test_meetings.py",
    ),
    Guard(
        "what is tidied was there before the epoch is checked",
        "save.py",
        "        found: Sequence[retention.Leftover] = ()\n",
        "        found: Sequence[retention.Leftover] = ()\n        self._saver.lease.check()\n        self._saver.lease = Unguarded()\n",
        "tests/test_meetings.py",
    ),
    Guard(
        "a directory that was made anew by the marker is no step",
        "publish.py",
        "        if fmt.STEP_NAME not in store.children(staged.directory):\n",
        "        if False:\n",
        "tests/test_meetings.py",
    ),
    Guard(
        "a save removes what has stepped aside for it, and nothing that has for another one",
        "retention.py",
        "        if not renames or name == own:\n",
        "        if True:\n",
        "tests/test_meetings.py",
    ),
    Guard(
        "what has only stepped aside is deleted as any step is",
        "retention.py",
        '(fmt.parse_aside_name(name) == (step, "replaced") and not replaced)',
        "False",
        "tests/test_meetings.py",
    ),
    Guard(
        "what was learnt before the run was taken is forgotten",
        "save.py",
        "        self.forget()  # another job may",
        "        # another job may",
        "tests/test_meetings.py -k learnt",
    ),
    Guard(
        "who is overtaken while it takes the run fences nobody",
        "retention.py",
        "    if not is_newest():  # or what was found may be the next owner's\n        return\n",
        "",
        "tests/test_meetings.py -k overtaken",
    ),
    Guard(
        "nor does it hold the run",
        "lease.py",
        "            if self._newer(mine.epoch) is not None:\n                return self._take(run, fence)\n        self._older",
        "        self._older",
        "tests/test_lease.py -k overtaken",
    ),
    Guard(
        "a directory that was listed and is not there is looked for again",
        "inspection.py",
        "    moves = not _is_empty(store, name) if not inside else ",
        "    moves = False if not inside else ",
        "tests/test_meetings.py -k reader",
    ),
    Guard(
        "a marker that was there and is gone is looked for again",
        "inspection.py",
        '"it is being deleted", moves=True)',
        '"it is being deleted")',
        "tests/test_meetings.py -k reader",
    ),
    Guard(
        "host records that are missing are looked for again",
        "inspection.py",
        "                moves=not _lacks(",
        "                moves=False and not _lacks(",
        "tests/test_meetings.py -k reader",
    ),
    Guard(
        "two void markers are two",
        "inspection.py",
        "(c.name, c.state, c.digest, c.void)",
        "(c.name, c.state, c.digest)",
        "tests/test_meetings.py -k two_saves",
    ),
    Guard(
        "a directory that was moved while it was listed is looked for again",
        "inspection.py",
        " else inside != _look_inside(store, name)[0]\n",
        " else False\n",
        "tests/test_meetings.py -k moved_meanwhile",
    ),
    Guard(
        "a root that changes all the time is not taken as it was seen last",
        "inspection.py",
        "        if any(c.moves for c in inspection.candidates):\n            raise",
        "        if False:\n            raise",
        "tests/test_meetings.py -k changes_whenever",
    ),
    Guard(
        "before a second look a step must have its name",
        "restore.py",
        "            self._stop_if_away(candidate)\n            found",
        "            found",
        "tests/test_meetings.py -k away_at_every_look",
    ),
    Guard(
        "what could not be loaded is loaded once more",
        "restore.py",
        "            for number in range(2):\n                if number and renames:\n",
        "            for number in range(1 if renames else 2):\n                if number and renames:\n",
        "tests/test_meetings.py -k away_when_it_was_loaded",
    ),
    Guard(
        "verify asks whether a step has changed while it was read",
        "cli/reading.py",
        "        if has_moved(store, candidate):\n",
        "        if False:\n",
        "tests/test_meetings.py -k command_line",
    ),
    Guard(
        "and looks twice",
        "cli/reading.py",
        "    is_twice = not isinstance(store, SupportsRename)",
        "    is_twice = True",
        "tests/test_meetings.py -k command_line",
    ),
    Guard(
        "so does show",
        "cli/reading.py",
        "        if number and not has_moved(store, candidate):\n",
        "        if True:\n",
        "tests/test_meetings.py -k command_line",
    ),
    Guard(
        "what is deleted is looked for when the run is this job's",
        "checkpointer.py",
        "        self._describe(steps)  # the run",
        "        # the run",
        "tests/test_checkpointer.py -k owner_before",
    ),
    Guard(
        "a step is damaged where it is so twice",
        "restore.py",
        "        if found[1] and isinstance(self._store, SupportsRename):\n",
        "        if False:\n",
        "tests/test_meetings.py -k moves_for_a_moment",
    ),
    Guard(
        "which of two directories is the newer step does not hang on clocks of two jobs",
        "inspection.py",
        "            age = c.marker.epoch, c.marker.committed_at, c.name\n",
        "            age = 0, c.marker.committed_at, c.name\n",
        "tests/test_leftovers.py -k newest",
    ),
    Guard(
        "a void marker that hides no copy goes after a day",
        "retention.py",
        "    hides = name == fmt.step_name(step) and _is_aside(store, step)\n",
        "    hides = _is_aside(store, step)\n",
        "tests/test_leftovers.py -k hides_nothing",
    ),
    Guard(
        "a step is moved into a directory that was made for it",
        "retention.py",
        "        _move_into(store, step, name, aside, lease)\n",
        "        store.rename(name, aside)\n",
        "tests/test_lease.py -k 'lost_the_run and file and deletes'",
    ),
    Guard(
        "what is about to be deleted stands in the lease",
        "retention.py",
        "        lease.announce(step, seen.digest)\n",
        "        lease.check()\n",
        "tests/test_lease.py -k 'lost_the_run and bucket and deletes'",
    ),
    Guard(
        "an owner that is alive keeps the run",
        "lease.py",
        "                moves, watched, since = watched is not None, newest, now\n",
        "                moves, watched = watched is not None, newest\n",
        "tests/test_lease.py -k 'dies_while or as_soon_as'",
    ),
    Guard(
        "the epoch stands in the marker",
        "save.py",
        "                epoch=self._saver.lease.epoch,\n",
        "                epoch=0,\n",
        "tests/test_lease.py -k epoch_stands",
    ),
    Guard(
        "what has lost its claim and is nothing but ours is removed",
        "retention.py",
        '    unclaimed = claim is None and role in ("staging", "deleting")\n',
        "    unclaimed = False\n",
        "tests/test_power.py -k claim_is_lost",
    ),
    # Who shows no sign of life
    Guard(
        "a silent host is not waited for",
        "hosts.py",
        "        silent = self._board.silent()\n        return sorted",
        "        silent = {}\n        return sorted",
        "tests/test_beacons.py -k primary_names",
    ),
    Guard(
        "who has gone after its part of a gather is named",
        "restore.py",
        "deadline, together=True)",
        "deadline)",
        "tests/test_replicas.py -k has_gone_after",
    ),
    Guard(
        "who comes too late to a gather is no error",
        "restore.py",
        "contextlib.suppress(PeerLostError, ValueError)",
        "contextlib.suppress(PeerLostError)",
        "tests/test_replicas.py -k never_ends",
    ),
    Guard(
        "only what is in the devices' own memory is gathered",
        "arrays/replicas.py",
        "if sharding.memory_kind not in (None, mesh.devices.flat[0].default_memory().kind):",
        "if False:",
        "tests/test_replicas.py -k own_memory",
    ),
    Guard(
        "hosts whose meshes have their devices in another order are told so",
        "arrays/replicas.py",
        " {_devices(self.sharding.mesh)}",
        "",
        "tests/test_replicas.py -k same_order",
    ),
    Guard(
        "who was stopped itself takes nobody for silent",
        "beacons.py",
        "            self._awake += min(now - self._looked, self._longest_gap)\n",
        "            self._awake += now - self._looked\n",
        "tests/test_beacons.py -k stopped_itself",
    ),
    Guard(
        "the others are watched only while the board answers",
        "beacons.py",
        "            self._watched += min(now - self._answered, self._longest_gap)\n",
        "            self._watched += now - self._answered\n",
        "tests/test_beacons.py -k does_not_answer",
    ),
    Guard(
        "uploads are compared by the bucket",
        "buckets.py",
        '{"name": self._name(key), "crc32c": crc}',
        '{"name": self._name(key)}',
        "tests/test_buckets.py -k damaged_on_its_way_is",
    ),
    Guard(
        "what is read is compared with its checksum",
        "buckets.py",
        "if wanted is not None and wanted != fmt",
        "if False and wanted != fmt",
        "tests/test_buckets.py -k own_checksum",
    ),
    Guard(
        "a typed key comes back as one",
        "arrays/leaves.py",
        '    if is_key != (leaf.kind == "key"):',
        "    if False:",
        "tests/test_damage.py -k key",
    ),
    # Nothing from storage is trusted
    Guard(
        "a file that is too large is not read",
        "storage.py",
        "                if (size := os.fstat(descriptor).st_size) > limit:\n",
        "                if (size := os.fstat(descriptor).st_size) < 0:\n",
        "tests/test_conformance.py -k larger",
    ),
    Guard(
        "an object that is too large is not read",
        "buckets.py",
        '        for headers in ({"Range": f"bytes=0-{limit}"}, {}):\n',
        "        for headers in ({},):\n",
        "tests/test_buckets.py -k too_large_is_refused",
    ),
    Guard(
        "a part without a checksum is asked for again",
        "buckets.py",
        "            if is_checked:  #",
        "            if True:  #",
        "tests/test_buckets.py -k without_a_checksum",
    ),
    Guard(
        "a path below the root leads through no link",
        "storage.py",
        "_NO_LINK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK",
        "_NO_LINK = os.O_RDONLY | os.O_NONBLOCK",
        "tests/test_hostile.py -k 'link_out_of_a_step and hosts'",
    ),
    Guard(
        "nothing but a file is opened",
        "storage.py",
        "            kind = _irregular(name, parent)\n            if kind is None:\n                descriptor = os.open(name, _NO_LINK, dir_fd=parent)\n                if stat.S_ISREG(os.fstat(descriptor).st_mode):\n                    return descriptor\n                os.close(descriptor)\n",
        "            kind = _irregular(name, parent)\n            return os.open(name, _NO_LINK, dir_fd=parent)\n",
        "tests/test_hostile.py -k fifo",
    ),
    Guard(
        "links to directories are listed",
        "storage.py",
        "for name in (*names, *inner)]",
        "for name in names]",
        "tests/test_hostile.py -k no_record_names",
    ),
    Guard(
        "links are looked for at each level",
        "inspection.py",
        "    wrong = find_irregular(listing, directory)\n",
        "    wrong: dict[str, str] = {}\n",
        "tests/test_hostile.py -k link_out_of_a_step",
    ),
    Guard(
        "links are looked for where no record names a file",
        "inspection.py",
        '    if not isinstance(store, SupportsRename) and (level == "marker" or not files):\n',
        "    if not files:\n",
        "tests/test_hostile.py -k does_not_hide_a_link",
    ),
    Guard(
        "links are looked for in a step of plain Orbax",
        "restore.py",
        "                elif isinstance(self._store, SupportsRename):\n                    found = find",
        "                elif False:\n                    found = find",
        "tests/test_hostile.py -k plain_orbax",
    ),
    Guard(
        "a deletion goes through no link",
        "storage.py",
        '                os.close(self._open_directory(prefix.rpartition("/")[0]))  # by no link\n',
        "",
        "tests/test_hostile.py -k deletion_removes_links",
    ),
    Guard(
        "a marker has a host",
        "format.py",
        "        marker.hosts < 1\n        or len(marker.records)",
        "        len(marker.records)",
        "tests/test_hostile.py -k no_hosts",
    ),
    Guard(
        "numbers have a range",
        "format.py",
        "not -_MOST < value < _MOST",
        "False",
        "tests/test_hostile.py -k wrong_types",
    ),
    Guard(
        "texts are short and plain",
        "format.py",
        "    if isinstance(value, str) and not _is_plain(value):\n",
        "    if False:\n",
        "tests/test_hostile.py -k wrong_types",
    ),
    Guard(
        "values are counted before they are made",
        "format.py",
        '    if _values(data) > MAX_VALUES:\n        raise InvalidRecordError(f"{name} has more',
        '    if False:\n        raise InvalidRecordError(f"{name} has more',
        "tests/test_hostile.py -k million",
    ),
    Guard(
        "values are counted when they are saved",
        "format.py",
        "    if _values(data) > MAX_VALUES:\n        raise InvalidArgumentError(",
        "    if False:\n        raise InvalidArgumentError(",
        "tests/test_hostile.py -k not_saved",
    ),
    Guard(
        "the structure of a state is checked",
        "trees.py",
        '            _check_structure(body.get("structure"), numbers, len(leaves))\n',
        "            numbers += range(len(leaves))\n",
        "tests/test_hostile.py -k wrong_types",
    ),
    Guard(
        "an empty array is empty",
        "trees.py",
        "        if 0 not in shape or math",
        "        if math",
        "tests/test_hostile.py -k wrong_types",
    ),
    Guard(
        "a leaf that cannot be is an error of ours",
        "trees.py",
        '    except (TypeError, ValueError) as error:\n        raise fmt.InvalidRecordError(f"{fmt.TREE_NAME}: {spec.name}',
        '    except ZeroDivisionError as error:\n        raise fmt.InvalidRecordError(f"{fmt.TREE_NAME}: {spec.name}',
        "tests/test_hostile.py -k prng_key",
    ),
    Guard(
        "what cannot be loaded is an error of ours",
        "restore.py",
        "unread=told)",
        "unread=error)",
        "tests/test_hostile.py -k 'right_digests or prng'",
    ),
    Guard(
        "texts of others are masked",
        "errors.py",
        "    text = mask(text)\n",
        "",
        "tests/test_secrets.py -k 'masked or token_reaches'",
    ),
    Guard(
        "a cause with a secret is not chained",
        "buckets.py",
        "            ) from cause(error)",
        "            ) from error",
        "tests/test_secrets.py -k client_that_tells",
    ),
    Guard(
        "a password in a root is not repeated",
        "config.py",
        'if "@" in rest else root  # a password',
        "if False else root  # a password",
        "tests/test_secrets.py -k with_a_password",
    ),
    Guard(
        "files are made as the umask says",
        "storage.py",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)",
        "tests/test_secrets.py -k umask",
    ),
]


def copied(folder: Path) -> Path:
    for part in ("datarax_dist", "tests", "benchmarks", "docs", "README.md", "pyproject.toml"):
        source = TREE / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / part, ignore=ignored)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder / part)
    return folder


def main(wanted: list[str]) -> int:
    chosen = [g for g in GUARDS if not wanted or any(word in g.name for word in wanted)]
    unnoticed = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(JOBS):
            copies.put(copied(Path(folder) / str(number)))

        def tried(guard: Guard) -> tuple[Guard, float, str]:
            copy, begin = copies.get(), time.monotonic()
            try:
                noticed = removed(copy, guard)
                return guard, time.monotonic() - begin, noticed
            finally:
                copies.put(copy)

        for guard, seconds, noticed in pool.map(tried, chosen):
            if not noticed:
                unnoticed.append(guard.name)
            print(f"{seconds:5.1f} s  {guard.name}: {noticed or 'NOT NOTICED'}", flush=True)
    print(
        f"{len(chosen)} guards removed, one at a time;"
        f" no test notices the removal of {len(unnoticed)}: {', '.join(unnoticed) or 'none'}"
    )
    return 1 if unnoticed else 0


def removed(copy: Path, guard: Guard) -> str:
    """Returns the test that fails without a guard; empty when none does."""
    file = copy / "datarax_dist" / guard.file
    text = file.read_text()
    if text.count(guard.old) != 1:
        raise SystemExit(
            f"{guard.name}: {guard.file} has changed; it is there {text.count(guard.old)} times"
        )
    file.write_text(text.replace(guard.old, guard.new))
    try:
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -n 0 {guard.tests}"
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        with subprocess.Popen(
            command,
            shell=True,
            cwd=copy,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        ) as done:
            try:
                output, _ = done.communicate(timeout=_HANGS_SECONDS)
            except subprocess.TimeoutExpired:
                return "a test that does not come to an end"
            finally:
                with contextlib.suppress(ProcessLookupError):  # the tests' own processes, too
                    os.killpg(done.pid, signal.SIGKILL)
    finally:
        file.write_text(text)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{guard.name}: {guard.tests} did not run:\n{output[-2000:]}")
    failed = [line for line in output.splitlines() if line.startswith("FAILED ")]
    return failed[0].removeprefix("FAILED tests/").split(" - ")[0] if failed else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
