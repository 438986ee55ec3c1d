-- Every gold table again, from bronze alone and by another engine (DuckDB): nothing here comes from the module.
-- Money is counted in whole cents; (2 * sum + count) // (2 * count) rounds an average half up.

CREATE MACRO tidy(method) AS regexp_replace(lower(trim(method)), '[ _-]+', '_', 'g');
CREATE MACRO mean_of(cents, n) AS
    CASE WHEN n = 0 THEN 0.00 ELSE (((2 * cents + n) // (2 * n)) / 100)::DECIMAL(20, 2) END;
CREATE MACRO dollars(cents) AS (cents::HUGEINT * 0.01::DECIMAL(3, 2))::DECIMAL(20, 2);

CREATE TABLE valid_transaction AS
WITH valid AS (
    SELECT * FROM bronze_transactions t
    WHERE transaction_id IS NOT NULL AND quantity > 0 AND amount > 0
        AND timestamp < DATE '2026-03-05' AND timestamp IS NOT NULL
        AND tidy(payment_method) IN
            ('credit_card', 'paypal', 'debit_card', 'apple_pay', 'google_pay', 'bank_transfer')
        AND status IN ('pending', 'completed', 'cancelled', 'refunded')
        AND EXISTS (FROM bronze_customers c WHERE c.customer_id = t.customer_id)
        AND EXISTS (FROM bronze_products p WHERE p.product_id = t.product_id)
)
SELECT * FROM valid
WHERE transaction_id NOT IN (SELECT transaction_id FROM valid GROUP BY 1 HAVING count(DISTINCT product_id) > 1)
QUALIFY row_number() OVER (
    PARTITION BY transaction_id
    ORDER BY timestamp DESC, list_position(['refunded', 'cancelled', 'completed', 'pending'], status)
) = 1;

CREATE TABLE sale AS
SELECT t.*, category, tidy(payment_method) AS method, (amount * 100)::BIGINT AS cents
FROM valid_transaction t JOIN bronze_products USING (product_id)
WHERE status = 'completed';

CREATE TABLE buyer AS
SELECT
    customer_id, any_value(city) AS city, count(cents) AS orders, coalesce(sum(cents), 0) AS spent,
    any_value(CASE WHEN age BETWEEN 0 AND 120 THEN age END) AS age,
    CASE WHEN spent > 300000 THEN 'Premium' WHEN spent > 150000 THEN 'Gold' WHEN spent > 50000 THEN 'Silver'
        ELSE 'Bronze' END AS segment
FROM bronze_customers LEFT JOIN sale USING (customer_id)
GROUP BY customer_id;

CREATE TABLE expected_customer_analytics AS
SELECT
    segment, city, count(*),
    CASE WHEN count(age) = 0 THEN 0.0 ELSE ((20 * sum(age) + count(age)) // (2 * count(age)) / 10) END::DECIMAL(4, 1),
    mean_of(sum(spent), count(*)), mean_of(sum(spent), sum(orders)), dollars(sum(spent))
FROM buyer GROUP BY segment, city;

CREATE TABLE expected_category_analytics AS
SELECT
    category, count(*), dollars(sum(cents)), mean_of(sum(cents), count(*)), dollars(min(cents)), dollars(max(cents)),
    sum(quantity), (sum(cents)::DOUBLE / 100) / ((SELECT sum(cents) FROM sale)::DOUBLE / 100)
FROM sale GROUP BY category;

CREATE TABLE expected_payment_analytics AS
SELECT
    method, count(*), dollars(sum(cents)), mean_of(sum(cents), count(*)),
    count(*)::DOUBLE / (SELECT count(*) FROM sale)::DOUBLE
FROM sale GROUP BY method;

CREATE TABLE expected_device_analytics AS
SELECT device, browser, count(*), dollars(sum(cents)), mean_of(sum(cents), count(*)), sum(quantity)
FROM sale GROUP BY device, browser;

CREATE TABLE expected_product_analytics AS
SELECT
    category, supplier, count(*), mean_of(sum((price * 100)::BIGINT), count(*)), sum(stock_quantity),
    dollars(sum((price * 100)::BIGINT * stock_quantity))
FROM bronze_products WHERE is_active AND stock_quantity > 0 GROUP BY category, supplier;
