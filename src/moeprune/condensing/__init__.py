"""Which layers can do without a router, and by which experts: the searches of CD-MoE (arXiv 2412.00069).

The authors run the model once for each candidate. Here it runs once: a layer's experts put out the same whatever else
is chosen, so a candidate is a sum of what is there already; and a condensed layer changes nothing before it, so the
model is run from that layer on alone. Candidates race, and those that are clearly not the nearest drop out.
"""
