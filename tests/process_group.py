"""Several shares of a piece of work in the threads of one process, with a dictionary in place of JAX's meeting service."""

import threading
import types

import jax

from truepose_jax.runtime.distributed import Several


class Board:
    """As jax._src.distributed.State's client, of `count` processes."""

    def __init__(self):
        self._said, self._lock = {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._lock:
            if key in self._said and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key}")
            self._said[key] = value

    def key_value_dir_get(self, key):
        with self._lock:
            return [(name, value) for name, value in self._said.items() if name.startswith(f"{key}/")]


def share_work(count, work):
    """[what work(share) returned, or the exception that it ended with] of each of `count` processes."""
    board, ends = Board(), [None] * count

    def run(index):
        share = Several(types.SimpleNamespace(process_id=index, num_processes=count, client=board))
        try:
            with share.told():
                ends[index] = work(share)
        except BaseException as error:
            ends[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
        assert not thread.is_alive(), "a process waits for ever"
    return ends
