import java.util.HashMap;

/** Integers, floating point and maps. */
public class Work {
    public static void main(String[] arguments) {
        HashMap<Integer, Long> sums = new HashMap<>();
        for (int i = 0; i < 3000000; i++) {
            sums.merge((int) (i * 2654435761L % 10007), (long) i, Long::sum);
        }
        double total = 0;
        for (int i = 1; i < 20000000; i++) {
            total += 1.0 / i;
        }
        System.out.println(sums.size() + " " + sums.get(5003) + " " + total);
    }
}
