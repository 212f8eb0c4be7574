"""`ds-sft prepare CONFIG`: encode the data of a run, without a GPU, before it is started.

Training with the same configuration then finds the encoded rows in the cache, on every node that shares it. A call that
was interrupted continues where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds_sft.config.keys import Config
from ds_sft.config.read import load_config
from ds_sft.engine.zero import configured_engine
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch

USAGE = """usage: ds-sft prepare CONFIG.yaml [--key value ...]

Reads and encodes train_file and eval_file into the cache and says what happened to every row. All cores are used;
`preprocessing_num_workers` says how many. Ctrl-C keeps what is done: the next call continues. No GPU is needed, and no
weights: model_name_or_path needs config.json and the tokenizer. `ds-sft train --help` lists the keys."""


def main(argv: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        raise SystemExit(0)
    config, launch = read_run_config(argv, "prepare"), Launch(launcher="python")
    from ds_sft.data.dataset import load_data, print_report
    from ds_sft.model.limits import check_limits
    from ds_sft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config, launch)
    data = load_data(config, tokenizer, launch)
    print_report(data.report, launch)
    check_limits(config, tokenizer, data, launch)
    return 0


def read_run_config(argv: Sequence[str], command: str, flags: Iterable[str] = ()) -> Config:
    """The configuration of `ds-sft COMMAND CONFIG.yaml [--key value ...]`; `flags` as for `load_config`.

    Raises:
        UserError: no configuration, or a mistake in it.
    """
    if not argv:
        raise UserError(f"expected ds-sft {command} CONFIG.yaml; --help says more")
    config = load_config(argv, f"ds-sft {command}", flags=flags)
    configured_engine(config)  # not needed here, but a run would end with what is wrong in it
    return config
