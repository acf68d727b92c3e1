"""Workloads x peers x measures, side by side, kept as JSON from which tables and a picture are made.

- `python -m bench --out bench/results/NAME.json` measures everything, on the CPU; `--device cuda` on a GPU.
- `python -m bench report bench/results/NAME.json --readme README.md` makes NAME.md, NAME.png and the README's section.
- `python -m bench check` compares every contender's update with the recipe's, or where there is none with that of the
  loop by hand, in float64, and measures nothing.
- `python -m bench bars` times the bars of the first release.

`--workloads`, `--peers` and `--measures` choose; `--rounds` is how often. A peer that is not installed, or that cannot
express a workload, is in the results with the reason. The peers come with the extra `bench`. The workloads `wgan-gp`,
`byol` and `sac` are whole training programs, with optimizers, turns and targets of their own: there the peers are the
loop by hand and ours, and a step of WGAN-GP is five calls, one turn of the generator.

The workloads `meet-MODEL-RULE` are multi-task training under a merge rule, and run only where they are named: MODEL is
`mlp`, `vit-2`, `vit-4`, `vit-8` or `resnet`, RULE is `sum`, `mean`, `pcgrad`, `mgda`, `imtl-g`, `cagrad`,
`aligned-mtl`, `graddrop`, `upgrad` or `mgda-activations`. The peers that know rules are `summed`, `torchjd`,
`torchjd-in-turn` (one gradient after the other, without vmap), `torchjd-gramian` (its engine for the Gramian),
`by-hand` and ours; the second and the third of TorchJD's are there where they are named. What draws random numbers is
timed and not compared: GradDrop, and the PCGrad of TorchJD with more than two losses.
"""
