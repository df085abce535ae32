"""`cpikan-hr report RUN`: everything about a trained run in one HTML file that asks nothing of any network.

write      the order of things: head, sections, tiles, data, script
plan       which layers there are, their units and colours
layers     one pass over the field: the map, and its error and residual at a lower resolution
pyramid    a layer as compressed tiles on several levels, written while its rows come in
sections   tables and places for the maps, each a function that knows only its own part
figures    numbers of the run, and the classical decode's beside them
assets     the page's own style and script
"""

from cpikan_hr.report.write import write_report

__all__ = ["write_report"]
