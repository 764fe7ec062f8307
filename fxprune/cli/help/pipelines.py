"""Pipelines

Every run is a sequence of passes, and report.json has it as text under "pipeline". Each pass prints itself with the
options that are not default; the same text, with the same data, samples and seed, gives the same plan again:

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
  rotate-width{untie=true}                 pre-norm streams in their principal basis; behind find-groups, needs data
  propagate-axes find-groups unshare       what can be pruned; find-groups{align=8,floor=0.1,freeze=[blocks.0.*]}
  align-heads                              behind find-groups: heads in the basis whose last elements can go, by the
                                           data; align-heads{basis=weights} without. help methods
  find-token-sites                         where tokens could become fewer
  score-groups{criterion=NAME{..}}         scores; refine-scores: again where the search was in doubt; measure-rungs:
                                           what the whole tail of qk, v, width costs, in place of a sum
  search-plan{budget=flops=0.5,kinds=[head ffn],method=auto}     the plan; --flops also gives the budget
  rank-within rearrange{rounds=1}          which elements, once it is known how many
  recover{method=auto}                     fits weights; before slice-axes
  slice-axes                               and behind it, always: fold-indices, spell-out-tokens, propagate-axes; before
                                           the last fuse-norms, where widths were rotated

What a run decides between passes is printed as passes that state the decision, so that nothing is decided anew:

  plan-tokens{reducer=tome,counts=[8 6]}   tokens that go behind each attention; a search-plan behind it spends what is
                                           left of its budget. Before slice-axes, always: merge-tokens, propagate-axes,
                                           find-groups
  keep-counts{counts=[blocks.0.mlp.0:ffn=96 ..]}     so many stay, by their scores: a search by measured time
  start-round, .. slice-axes, propagate-axes, find-groups{inherit=true}, score-groups, search-plan, .. join-rounds
                                           a round on what the plan so far leaves, under the limits of the whole model;
                                           join-rounds goes back to it with one plan. Shares in budgets are of the whole
  find-blocks{pattern=32x32}, score-groups{criterion=lsp}, search-blocks{budget=flops=0.5}, recover-blocks
                                           tiles, behind slice-axes and what always follows it; their share is of the
                                           model before slicing. Always at the end: sparsify-blocks
  find-groups{align=1}, permute-channels, propagate-axes, find-blocks{pattern=2:4}, score-groups, search-blocks
                                           two of every four, which need no budget
  read-plan{digest=3f0c..}                 a plan that was given (fxprune apply, fxprune export). It is given again with
                                           --plan; the digest says whether it is the same one, and without digest any
                                           plan goes. Its tiles need no passes

plan-tokens and keep-counts may name the budget that they come from, as budget=flops=0.5 or budget=latency=0.7: the
report of the replay then has it. Counts that exceed the MACs, parameters or bytes stated with them are an error.

So two rounds by hand:

  fxprune compile model.pt --pipeline "propagate-axes,find-groups,score-groups,search-plan{budget=flops=0.7},\\
    start-round,slice-axes,propagate-axes,find-groups{inherit=true},score-groups,search-plan{budget=flops=0.5},\\
    join-rounds,slice-axes"

>>> one = fxprune.compile(model, torch.randn(2, 16), flops=0.5, rounds=2)
>>> two = fxprune.compile(model, torch.randn(2, 16), pipeline=one.report["pipeline"])
>>> one.plan.choices == two.plan.choices, "start-round" in two.report["pipeline"]
(True, True)

A plan from a file, and fitted to your data afterwards, which `fxprune apply` does not do:

  fxprune plan model.pt --flops 0.5 --data data.npz --out plan.json
  fxprune compile model.pt --plan plan.json --data data.npz \\
    --pipeline "propagate-axes,find-groups{align=1},read-plan,recover,slice-axes"

>>> given = fxprune.apply(model, one.plan, torch.randn(2, 16))
>>> again = fxprune.compile(model, torch.randn(2, 16), plan=one.plan, pipeline=given.report["pipeline"])
>>> again.plan == given.plan, again.report["pipeline"] == given.report["pipeline"]
(True, True)

Not in the text: --samples, --seed and --data, which are given beside it; --held-out, the share of the data that a sweep
without --judge held back (0.25, under "data" in the report); and --plan, for read-plan. Nor is time: a replay goes by
counts and reads no clock. It predicts with --latency-table (latency.json of the first artefact: the same prediction) or
the table that this machine keeps, and what it achieves is told of the delivered file alone; a note says what is not
known.

Runs are repeated by their options, too, with --config report.json: a run by time is measured again then, and a point of
a sweep is compiled alone. A delivery of `fxprune export` states its request in manifest.json instead.

Passes of plugins may stand anywhere before slicing, or behind it and before tiles.
"""
