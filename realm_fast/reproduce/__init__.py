"""REALM's tables again, at the scale of the machine at hand: `realm-fast reproduce ablations`, `… qa`.

OUT/corpus                    the token store and, beside it, spans and evidence (unless --corpus names one)
OUT/questions/                the question sets, each question marked reachable or not
OUT/start/                    the run whose `ict` and `warmup` stages all arms start from
OUT/plan.json                 how many joint steps an arm makes, and the measurements that this follows from
OUT/{ablations,qa}/runs/      a run folder for each arm and seed
OUT/{ablations,qa}/results/   a JSON file for each arm and seed that is done: it is not run again
OUT/{ablations,qa}/           table.md, table.json, plot.png
"""
