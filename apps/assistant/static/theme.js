// Before the first paint, so that a dark page never flashes white. The server's setting is the truth, this its echo.
const known = localStorage.getItem("theme");
if (known === "light" || known === "dark") document.documentElement.dataset.theme = known;
