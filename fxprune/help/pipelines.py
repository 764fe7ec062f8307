"""Pipelines

Every run is a sequence of passes, and report.json has it as text under "pipeline". Each pass prints itself with the
options that are not default; the same text can be given back:

  fxprune compile model.pt --data data.npz --flops 0.5 \\
    --pipeline "propagate-axes,find-groups,score-groups{criterion=fisher},search-plan,recover{method=ridge},slice-axes"

>>> import torch, fxprune
>>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
>>> one = fxprune.compile(model, torch.randn(2, 16), flops=0.5)
>>> two = fxprune.compile(model, torch.randn(2, 16), pipeline=one.report["pipeline"])
>>> one.plan.choices == two.plan.choices, one.report["pipeline"] == two.report["pipeline"]
(True, True)

Analyses find facts (axes, groups, scores), searches make the plan, transforms change graph or weights and drop the
facts that no longer hold. A pass whose facts are not there is an error before anything runs, and says what to put
before it.

  clean inline drop-masks fold-weights     preparation; comes first by itself where the text names none of it
  unfuse                                   splits fused qkv, so that qk and v widths can differ
  propagate-axes find-groups unshare       what can be pruned; find-groups{align=8,floor=0.1,freeze=[blocks.0.*]}
  find-token-sites                         where tokens could become fewer
  score-groups{criterion=NAME{..}}         scores; refine-scores: again where the search was in doubt
  search-plan{budget=flops=0.5,kinds=[head ffn],method=auto}     the plan; --flops also gives the budget
  rank-within rearrange{rounds=1}          which elements, once it is known how many
  recover{method=auto}                     fits weights; before slice-axes
  slice-axes                               and behind it, always: fold-indices, spell-out-tokens, propagate-axes

Not everything is a pass: rounds, token counts and tiles are decided between passes. Their runs are repeated by
options, --config report.json, and the text says so where it is given one of those passes. Passes of plugins may
stand anywhere.
"""
