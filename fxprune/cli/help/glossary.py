"""Words

here              means                                 Torch-Pruning       NNCF 2.x (filter      ModelOpt (pruning)
                                                                            pruning)
----------------  ------------------------------------  ------------------  --------------------  ------------------
axis              interchangeable elements that some    (dependency graph)  (pruning groups)      hparam
                  tensor dimensions are made of
group             an axis that reaches weights: what    Group               cluster of modules    hparam of a
                  is scored and cut together                                                      dynamic module
kind              head, kv, ffn, channel, token ..      root module type    -                     -
frozen, --freeze  must keep its size, with the reason   ignored_layers      ignored_scopes        -
importance,       a number per element: what its loss   Importance          filter importance     importance, score
criterion         does
budget            what the result may cost at most      pruning_ratio (a    pruning_target,       constraints
                                                        share of channels)  pruning_flops_target
granularity,      kept counts are multiples of it       round_to            -                     channel divisor
--align
floor             the smallest share that stays         max_pruning_ratio   -                     -
one ledger        all groups compete for the budget     global_pruning      all_weights           search
plan              which elements stay; a JSON file      pruning history     pruning statistics    subnet
round             score, cut a part, score again        iterative_steps     pruning schedule      -
mask              zero elements, shapes as before:      -                   what it trains with   what it searches
                  what slicing is compared with                                                   with
slice             index the weights: smaller tensors    group.prune()       at export             export
recovery          fit what is left, without labels      (fine-tune)         (fine-tune)           (fine-tune,
                                                                                                  distil)
exact             cutting equals masking                -                   -                     checked in its
                                                                                                  tests
MACs              multiply-accumulates of one sample;   MACs                FLOPs                 FLOPs
                  what papers call FLOPs
target, artefact  what is written, with the evidence    (torch.save)        exported model        (restore, export)
token site        an attention behind which tokens may  -                   -                     -
                  become fewer
tile              outputs x inputs of a weight, zeroed  -                   -                     (2:4 sparsity)
                  or kept together
effective,        MACs of what is not zero, and of      -                   -                     -
executed          what runs

Words of other tools are theirs at the time of writing; a dash means that we know of no such thing, not that there is
none.
"""
