"""The mathematics: paths, kernels, plans, rollouts, surrogates, links and exact worlds; torch only.

Everything here is a pure function of tensors in the conventions of CONTRIBUTING: ``sigma`` is 1 for pure noise
and 0 for data, ``x = (1 - sigma) * x0 + sigma * noise`` and ``velocity = noise - x0``.
"""
