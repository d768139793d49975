"""Studies: methods side by side, from a plan of runs to one table and one page. One pipeline, file by file:

- `config` reads a study, `cells` makes its plan: methods × sizes × seeds, each run with the hash of what decides its
  numbers; `check` finds out before the first run what would fail in each;
- `pool` with `worker`, `lock` and `state` executes it, resumably, in parallel or one after another; `cluster` on Slurm;
- `runs` reads the folders that runs leave, `results` puts their numbers into a frame and compares them by `statistics`;
- `table`, `figures` and `page` show them; `metric` has the words;
- `run` is `sinkroute compare`, `demo` is `sinkroute demo`, which also times steps in turn; `sinkroute report` is the
  page alone, over runs that were trained one by one.
"""
