const numbers = Array.from({ length: 400000 }, (_, i) => (i * 7919) % 1000003);
const counts = new Map();
for (const number of numbers) counts.set(number % 5003, (counts.get(number % 5003) || 0) + number);
const text = JSON.stringify([...counts].sort((a, b) => a[0] - b[0]));
let sum = 0;
for (let round = 0; round < 40; round++) for (let i = 0; i < 500000; i++) sum = (sum + i * round * 0.5) % 1000003;
console.log(text.length, text.match(/(\d)\1/g).length, sum);
console.log(require("crypto").createHash("sha512").update(text).digest("hex"));
