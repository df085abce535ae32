"""Files of measurements: whatever their order, separators, decimals and encoding, the same points and values; or one
line."""

import io

import numpy as np
import pytest
import torch

from cpikan_hr.errors import UserError
from cpikan_hr.problems.measurements import read_table

TABLE = np.array([[0.125, 0.5, -1.5], [0.75, 1.0, 2e-3], [0.5, 0.25, 3.0]])  # x, t, u


def saved(save, *arguments, **options) -> bytes:
    out = io.BytesIO()
    save(out, *arguments, **options)
    return out.getvalue()


def text(header: str, order: list[int], separator: str = ",", decimal: str = ".") -> str:
    rows = [separator.join(f"{v:.17g}" for v in row).replace(".", decimal) for row in TABLE[:, order]]
    return "\n".join([header, *rows] if header else rows) + "\n"


def structured() -> np.ndarray:
    found = np.zeros(3, dtype=[("u", float), ("t", float), ("x", float)])
    found["x"], found["t"], found["u"] = TABLE.T
    return found


GOOD = {
    "no names": text("", [0, 1, 2]),
    "names in another order": text("t,x,u", [1, 0, 2]),
    "the function first": text("u,x,t", [2, 0, 1]),
    "blanks around names, and units": text('"t" [s], x [m] ,u (K)', [1, 0, 2]),
    "capitals": text("T,X,U", [1, 0, 2]),
    "a capital that is another name": text("t,x,T", [1, 0, 2]),
    "a name of one's own for the only function": text("t,temperature,x", [1, 2, 0]),
    "names as a comment": text("# t, x, u", [1, 0, 2]),
    "names behind a remark": text("# in SI units\n# columns: t x u", [1, 0, 2], " "),
    "a remark": text("# measured at t = 0.5 and later", [0, 1, 2]),
    "semicolons": text("t;x;u", [1, 0, 2], ";"),
    "tabs": text("t\tx\tu", [1, 0, 2], "\t"),
    "blanks": text("t  x  u", [1, 0, 2], "   "),
    "decimal commas between semicolons": text("t;x;u", [1, 0, 2], ";", ","),
    "decimal commas between semicolons, no names": text("", [0, 1, 2], ";", ","),
    "decimal commas between tabs": text("", [0, 1, 2], "\t", ","),
    "decimal commas between blanks": text("t x u", [1, 0, 2], " ", ","),
    "lines of Windows, one empty": text("t,x,u", [1, 0, 2]).replace("\n", "\r\n") + "\r\n",
    "utf-8 with a mark": text("t,x,u", [1, 0, 2]).encode("utf-8-sig"),
    "utf-16": text("t,x,u", [1, 0, 2]).encode("utf-16"),
    "latin-1": text("t [s],x [\u00b5m],u", [1, 0, 2]).encode("latin-1"),
    "npy": saved(np.save, TABLE),
    "npy with names": saved(np.save, structured()),
    "npz": saved(np.savez, u=TABLE[:, 2:], t=TABLE[:, 1], x=TABLE[:, 0]),
    "npz of one array": saved(np.savez, TABLE),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_table_is_read_by_its_names_in_any_format(case, tmp_path):
    path = tmp_path / "measured.dat"
    path.write_bytes(GOOD[case].encode() if isinstance(GOOD[case], str) else GOOD[case])
    assert np.array_equal(read_table(path, ("x", "t"), 1), TABLE)


BAD = {
    "a name that is no axis": (text("t,y,u", [1, 0, 2]), "its columns are called t, y, u; call them x, t, u"),
    "a name twice": (text("x,x,u", [1, 0, 2]), "called x, x, u"),
    "an axis that is missing": (text("x,u,v", [1, 0, 2]), "called x, u, v"),
    "a name too many": ("x,t,u,sigma\n0,0,1,1\n", "line 1 names 4 instead of 3 columns"),
    "a name too few": ("x,u\n0,0,1\n", "line 1 names 2 instead of 3 columns"),
    "numbers among names": (text("x,0.5,u", [0, 1, 2]), "line 1: 'x' is no number"),
    "a comment with another axis": (text("# t, y, u", [1, 0, 2]), "called t, y, u"),
    "units below the names": (text("x,t,u\nm,s,K", [0, 1, 2]), "line 2: 'm' is no number"),
    "a ragged row": (text("t,x,u", [1, 0, 2]) + "0.5,0.5\n", "line 5 has 2 instead of 3 columns"),
    "a hole": ("0,,1\n", "line 1: '' is no number"),
    "decimal commas between commas": ("0,5,0,5,1,5\n", "line 1 has 6 instead of 3 columns"),
    "thousands": ("1.000,5;0;1\n", "'1.000,5' is no number"),
    "underscores": ("0,0,1_000\n", "'1_000' is no number"),
    "not a number": ("0,0,nan\n", "row 1 has numbers that are not finite"),
    "empty": ("", "3 columns, x, t, u"),
    "names alone": ("x,t,u\n", "3 columns, x, t, u"),
    "utf-16 without a mark": (text("", [0, 1, 2]).encode("utf-16-le"), "it is no text"),
    "npy with other names": (saved(np.save, structured()[["u", "t"]]), "called u, t"),
    "npz of different lengths": (saved(np.savez, x=np.zeros(2), t=np.zeros(3), u=np.zeros(3)), "2, 3, 3 numbers"),
    "npz of words": (saved(np.savez, x=np.array(["a"]), t=np.array(["b"]), u=np.array(["c"])), "no real numbers"),
    "a cut npz": (saved(np.savez, x=np.zeros(2), t=np.zeros(2), u=np.zeros(2))[:200], "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_refused_in_one_line(case, tmp_path):
    content, message = BAD[case]
    path = tmp_path / "measured.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as told:
        read_table(path, ("x", "t"), 1)
    assert message in str(told.value) and "\n" not in str(told.value)
    assert str(told.value).startswith(f"problem.measurements.path: {path}: ")


@pytest.mark.parametrize("names", ["v,t,u,x", "u1,t,u0,x", "u2,t,u1,x"])
def test_several_functions_are_found_by_name(names, tmp_path):
    (tmp_path / "two.csv").write_text(f"{names}\n4,2,3,1\n")
    assert read_table(tmp_path / "two.csv", ("x", "t"), 2).tolist() == [[1.0, 2.0, 3.0, 4.0]]
    (tmp_path / "other.csv").write_text("x,t,u,w\n4,2,3,1\n")
    with pytest.raises(UserError, match="called x, t, u, w; call them x, t, u, v"):
        read_table(tmp_path / "other.csv", ("x", "t"), 2)


def test_functions_with_names_are_found_by_those(tmp_path):
    (tmp_path / "plate.csv").write_text("m,x,w,t\n4,1,3,2\n")
    assert read_table(tmp_path / "plate.csv", ("x", "t"), 2, ("w", "m")).tolist() == [[1.0, 2.0, 3.0, 4.0]]
    with pytest.raises(UserError, match="call them x, t, m, n, in any order"):
        read_table(tmp_path / "plate.csv", ("x", "t"), 2, ("m", "n"))


def test_the_order_of_the_rows_is_kept(tmp_path):
    path = tmp_path / "many.csv"
    values = np.random.default_rng(0).random((1000, 3))
    np.savetxt(path, values[:, [2, 1, 0]], delimiter=",", header="u,t,x")
    assert torch.allclose(read_table(path, ("x", "t"), 1), torch.from_numpy(values), rtol=1e-15, atol=0)
