"""Budgets

Exactly one of

  --flops 0.5      half of the multiply-accumulates, or an amount: --flops 2.3G
  --params 20M     parameters
  --bytes 64MiB    bytes of parameters and buffers
  --latency 0.6    time of one call on the target, measured here; or milliseconds: --latency-ms 12

A number up to 1 is a share of the dense model; amounts have a unit (k, M, G, T; KiB, MiB, GiB) or are 1000 and more.

What is counted. FLOPs are multiply-accumulates of one sample at the example shapes: linear, matmul, einsum,
convolution, and both products of attention. Norms, softmax, activations, biases and embeddings are not. Papers mostly
mean the same by "FLOPs"; fvcore and thop count MACs, torch.utils.flop_counter counts twice as many. Cost is a
polynomial in the sizes of axes, and after slicing it is counted again on the graph that came out: the two must agree.

Latency is not MACs. Half of the MACs is rarely half of the time: small batches are bound by launches and memory. So
every artefact says how fast it is: the file as delivered, after recovery, beside the dense model's, lowered in the
same way and timed in turns at --batch (1) and --threads (the runtime's own). report.json has it under `measured`,
report.html under "Measured latency": median milliseconds of both, their ratio with its standard error, rounds, the
speed-up, and what share of dense over compressed MACs became real. It takes the lowering of the dense model and about
2 s; --seconds 5 is surer, --seconds 0 leaves it out, and --fast the page as well. The plan is the same either way.
From 64 MiB of dense weights on (512 MiB where time is the budget), one of the two is in memory at a time, and turns are
blocks of calls. Where one dense call takes longer than a second, the dense weights more than 2 GiB (or than --memory),
or the target is not finished here, the report says that instead. More batch sizes, on the machine that will run it,
written into the artefact:

  fxprune bench small --against model.pt --batch 1,8,32 --record

Or make time the budget:

  fxprune compile vit.pt --target onnx --latency 0.6 --batch 8 --threads 1 --data images/

Before the search the whole lowered model is timed with all layers of a kind at a few widths, in turns with the dense
one (once per device, versions, batch, threads and shapes). The plan is lowered and timed as well; where it misses by
more than 5 %, what was predicted is corrected and the search repeated, three rounds at most. The report has what was
predicted, what the plan took when it was searched, and what the delivered file takes. `latency.json` in the artefact
is the table: `--latency-table latency.json` makes the same plan on any machine. `--expect-latency` says what another
budget brings in time, and warns where that is little; `--align auto` takes widths that the target likes.

With tokens among what may go (`--prune heads,ffn,tokens --latency 0.6`) the table also has rows of the reducer: the
whole lowered model with tokens gone early and at few attentions, and spread over all of them, so that matching and
sorting are in the figures. Tokens and weights then share one ledger of milliseconds, and where the ops take longer than
they save, tokens stay. A table from before (version 1) holds widths alone: it is read, and refused where tokens are
asked for.

The budget is an upper bound and is met; how closely depends on --align. Out of reach is an error that says what is
reachable, and what stands in the way. What can be loosened then:

  --floor 0        shares that stay per layer (0.1 or less); --floor 'blocks.*.mlp=0.3' for some layers
  --allow-empty    whole branches may go; --prune heads,ffn,layers: those of residual streams alone
  --align 1        counts need not be multiples of 8; slower kernels, sometimes much slower
  --prune heads,ffn,qk,v,channels    more kinds of axes
  --prune heads,ffn,tokens           image tokens as well
  --prune heads,ffn,blocks           tiles inside what is left: zeros, which are speed only where a kernel was measured

One ledger holds all groups: a head is worth so much per MAC, a neuron so much, and the cheapest losses go first. How
many stay per layer is a result, not an input.
"""
